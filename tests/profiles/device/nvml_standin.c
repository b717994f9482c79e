/* A tiny libnvidia-ml.so.1: one GPU whose state lives in the file named by VOLTANA_NVML_STATE.
 * The file is a mapped struct of 32-bit words, so that other processes can read and set it. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    unsigned magic;
    unsigned locked_mhz;      /* 0: not locked */
    unsigned default_mhz;     /* SM clock while unlocked */
    unsigned deny_lock;       /* 1: set/reset answer NO_PERMISSION */
    unsigned lost;            /* 1: every call answers GPU_IS_LOST */
    unsigned energy_mode;     /* 0: counter, 1: unsupported, 2: non-monotone */
    unsigned power_mw;
    unsigned throttle_bits;
    unsigned stuck_mhz;       /* >0: the clock that is read, whatever is locked */
    unsigned foreign_pid;     /* >0: a process on the card; all ones: pid 0, an unseen one */
    unsigned num_locks;
    unsigned num_resets;
    unsigned num_energy_reads;
    unsigned temperature_c;
    unsigned limit_mw;        /* power limit in force */
    unsigned num_limits;      /* times it was set */
    unsigned num_gpus;        /* cards; all share this state */
    unsigned mig_mode;        /* 0: the card has none, 1: off, 2: on */
} State;

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4,
       INSUFFICIENT_SIZE = 7, LOST = 15 };
static State *s;

static int attach(void) {
    const char *path = getenv("VOLTANA_NVML_STATE");
    if (s) return OK;
    if (!path) return UNINITIALIZED;
    int fd = open(path, O_RDWR);
    if (fd < 0) return UNINITIALIZED;
    s = mmap(NULL, sizeof(State), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (s == MAP_FAILED) { s = NULL; return UNINITIALIZED; }
    return s->magic == 0x564F4C54 ? OK : INVALID;
}
#define GUARD do { if (!s) return UNINITIALIZED; if (s->lost) return LOST; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; return attach(); }
int nvmlInit_v2(void) { return attach(); }
int nvmlShutdown(void) { return OK; }
const char *nvmlErrorString(int code) {
    switch (code) {
    case NO_PERMISSION: return "Insufficient Permissions";
    case LOST: return "GPU is lost";
    case NOT_SUPPORTED: return "Not Supported";
    default: return "Stand-in Error";
    }
}
int nvmlSystemGetDriverVersion(char *out, unsigned n) { snprintf(out, n, "580.00"); return OK; }
int nvmlDeviceGetCount_v2(unsigned *n) { GUARD; *n = s->num_gpus; return OK; }
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { GUARD; *h = (char *)s + i; return OK; }
int nvmlDeviceGetName(void *h, char *out, unsigned n) { (void)h; GUARD; snprintf(out, n, "NVIDIA Standin 80GB"); return OK; }
int nvmlDeviceGetUUID(void *h, char *out, unsigned n) { GUARD; snprintf(out, n, "GPU-standin-%d", (int)((char *)h - (char *)s)); return OK; }
int nvmlDeviceGetMigMode(void *h, unsigned *current, unsigned *pending) {
    (void)h; GUARD;
    if (!s->mig_mode) return NOT_SUPPORTED;
    *current = *pending = s->mig_mode - 1; return OK;
}
typedef struct { unsigned long long total, free, used; } Memory;
int nvmlDeviceGetMemoryInfo(void *h, Memory *m) { (void)h; GUARD; m->total = 80ULL << 30; m->free = m->total; m->used = 0; return OK; }
int nvmlDeviceGetEnforcedPowerLimit(void *h, unsigned *mw) { (void)h; GUARD; *mw = 400000; return OK; }
int nvmlDeviceGetPowerUsage(void *h, unsigned *mw) { (void)h; GUARD; *mw = s->power_mw; return OK; }
int nvmlDeviceGetTemperature(void *h, int sensor, unsigned *c) { (void)h; (void)sensor; GUARD; *c = s->temperature_c; return OK; }
int nvmlDeviceGetTotalEnergyConsumption(void *h, unsigned long long *mj) {
    (void)h; GUARD;
    if (s->energy_mode == 1) return NOT_SUPPORTED;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    double seconds = now.tv_sec + now.tv_nsec * 1e-9;
    *mj = (unsigned long long)(seconds * s->power_mw);
    if (s->energy_mode == 2) *mj = 1000000000ULL - 1000ULL * ++s->num_energy_reads;
    return OK;
}
int nvmlDeviceGetSupportedMemoryClocks(void *h, unsigned *n, unsigned *out) {
    (void)h; GUARD;
    if (*n < 1 || !out) { *n = 1; return INSUFFICIENT_SIZE; }
    *n = 1; out[0] = 1593; return OK;
}
int nvmlDeviceGetSupportedGraphicsClocks(void *h, unsigned memory, unsigned *n, unsigned *out) {
    (void)h; GUARD;
    if (memory != 1593) return INVALID;
    if (*n < 81 || !out) { *n = 81; return INSUFFICIENT_SIZE; }
    for (unsigned i = 0; i < 81; i++) out[i] = 1410 - 15 * i;
    *n = 81; return OK;
}
int nvmlDeviceGetClockInfo(void *h, int type, unsigned *mhz) {
    (void)h; GUARD;
    if (type != 1) return INVALID;
    *mhz = s->stuck_mhz ? s->stuck_mhz : s->locked_mhz ? s->locked_mhz : s->default_mhz;
    return OK;
}
int nvmlDeviceGetCurrentClocksThrottleReasons(void *h, unsigned long long *bits) { (void)h; GUARD; *bits = s->throttle_bits; return OK; }
typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } Process;
int nvmlDeviceGetComputeRunningProcesses_v3(void *h, unsigned *n, Process *out) {
    (void)h; GUARD;
    if (!s->foreign_pid) { *n = 0; return OK; }
    if (*n < 1 || !out) { *n = 1; return INSUFFICIENT_SIZE; }
    memset(out, 0, sizeof *out);
    *n = 1; out[0].pid = s->foreign_pid == ~0u ? 0 : s->foreign_pid; return OK;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *h, unsigned *n, Process *out) { (void)h; (void)out; GUARD; *n = 0; return OK; }
int nvmlDeviceSetGpuLockedClocks(void *h, unsigned low, unsigned high) {
    (void)h; GUARD;
    if (s->deny_lock) return NO_PERMISSION;
    if (low != high) return INVALID;
    s->locked_mhz = low; s->num_locks++; return OK;
}
int nvmlDeviceGetPowerManagementLimit(void *h, unsigned *mw) { (void)h; GUARD; *mw = s->limit_mw; return OK; }
int nvmlDeviceGetPowerManagementLimitConstraints(void *h, unsigned *low, unsigned *high) {
    (void)h; GUARD;
    *low = 100000; *high = 400000; return OK;
}
int nvmlDeviceSetPowerManagementLimit(void *h, unsigned mw) {
    (void)h; GUARD;
    if (s->deny_lock) return NO_PERMISSION;
    if (mw < 100000 || mw > 400000) return INVALID;
    s->limit_mw = mw; s->num_limits++; return OK;
}
int nvmlDeviceResetGpuLockedClocks(void *h) {
    (void)h; GUARD;
    if (s->deny_lock) return NO_PERMISSION;
    s->locked_mhz = 0; s->num_resets++; return OK;
}
