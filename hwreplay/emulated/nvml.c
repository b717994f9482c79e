/* libnvidia-ml.so.1 of the emulated cards in the file that VOLTANA_EMULATED_CARDS names: as much of
 * NVML as voltana and nvidia-ml-py ask for. */
#include "card.h"
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <errno.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
       INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, LOST = 15, BAD_FILE = 990 };
#define MEMORY_MHZ 1593u

static void *file;
static char why[256];

static int attach(void) {
    if (file) return OK;
    const char *path = getenv("VOLTANA_EMULATED_CARDS");
    if (!path) return DRIVER_NOT_LOADED;
    file = voltana_map(path, why, sizeof why);
    return file ? OK : BAD_FILE;
}

static int is_lost(Record *r) { return r->ledger[r->active].lost != 0; }

#define GUARD Record *r = handle; do { \
    if (!file) return UNINITIALIZED; \
    if (!r) return INVALID; \
    if (is_lost(r)) return LOST; } while (0)

int nvmlInitWithFlags(unsigned flags) { (void)flags; return attach(); }
int nvmlInit_v2(void) { return attach(); }
int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int code) {
    switch (code) {
    case OK: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case LOST: return "GPU is lost";
    case BAD_FILE: return why;
    default: return "Unknown Error";
    }
}

/* --- who the cards are ------------------------------------------------------------------------ */

int nvmlSystemGetDriverVersion(char *out, unsigned n) { snprintf(out, n, "emulated"); return OK; }

int nvmlDeviceGetCount_v2(unsigned *n) {
    if (!file) return UNINITIALIZED;
    *n = ((Header *)file)->num_cards;
    return OK;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned i, void **out) {
    if (!file) return UNINITIALIZED;
    if (i >= ((Header *)file)->num_cards) return INVALID;
    *out = voltana_record(file, i);
    return is_lost(*out) ? LOST : OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **out) {
    if (!file) return UNINITIALIZED;
    for (unsigned i = 0; i < ((Header *)file)->num_cards; i++)
        if (!strcmp(voltana_record(file, i)->fixed.uuid, uuid))
            return nvmlDeviceGetHandleByIndex_v2(i, out);
    return NOT_FOUND;
}

int nvmlDeviceGetIndex(void *handle, unsigned *i) {
    GUARD;
    *i = (unsigned)(((char *)r - (char *)file - CARD_PAGE) / CARD_BYTES);
    return OK;
}
int nvmlDeviceGetName(void *handle, char *out, unsigned n) { GUARD; snprintf(out, n, "%s", r->fixed.name); return OK; }
int nvmlDeviceGetUUID(void *handle, char *out, unsigned n) { GUARD; snprintf(out, n, "%s", r->fixed.uuid); return OK; }

int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
    GUARD;
    if (!r->faults.mig_mode) return NOT_SUPPORTED;
    *current = *pending = r->faults.mig_mode - 1;
    return OK;
}

typedef struct { unsigned long long total, free, used; } Memory;
int nvmlDeviceGetMemoryInfo(void *handle, Memory *m) {
    GUARD;
    *m = (Memory){r->fixed.memory_bytes, r->fixed.memory_bytes, 0};
    return OK;
}

typedef struct { unsigned pid; unsigned long long used; unsigned gi, ci; } Process;
int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *n, Process *out) {
    GUARD;
    unsigned pids[MAX_PROCESSES + 1], found = 0;
    for (unsigned i = 0; i < MAX_PROCESSES; i++) {
        unsigned pid = r->faults.processes[i];
        if (pid && (kill((int)pid, 0) == 0 || errno == EPERM)) pids[found++] = pid;
    }
    unsigned foreign = r->faults.foreign_pid;
    if (foreign) pids[found++] = foreign == ~0u ? 0 : foreign;
    if (*n < found || (found && !out)) { *n = found; return INSUFFICIENT_SIZE; }
    if (found) memset(out, 0, found * sizeof *out);
    for (unsigned i = 0; i < found; i++) out[i].pid = pids[i];
    *n = found;
    return OK;
}
int nvmlDeviceGetGraphicsRunningProcesses_v3(void *handle, unsigned *n, Process *out) { (void)out; GUARD; *n = 0; return OK; }

/* --- readings --------------------------------------------------------------------------------- */

int nvmlDeviceGetPowerUsage(void *handle, unsigned *mw) { GUARD; *mw = (unsigned)lround(voltana_reading_w(r) * 1e3); return OK; }

int nvmlDeviceGetTotalEnergyConsumption(void *handle, unsigned long long *mj) {
    GUARD;
    if (r->faults.energy_mode == 1) return NOT_SUPPORTED;
    *mj = (unsigned long long)(voltana_counter_j(r) * 1e3);
    if (r->faults.energy_mode == 2)
        *mj = 1000000000ULL - 1000ULL * __atomic_add_fetch(&r->faults.num_energy_reads, 1, __ATOMIC_RELAXED);
    return OK;
}

/* Ours: 30 degrees at rest and 0.1 a watt, near what an A100 under air shows. */
int nvmlDeviceGetTemperature(void *handle, int sensor, unsigned *c) {
    (void)sensor;
    GUARD;
    *c = r->faults.temperature_c ? r->faults.temperature_c : (unsigned)(30 + 0.1 * voltana_reading_w(r));
    return OK;
}

int nvmlDeviceGetSupportedMemoryClocks(void *handle, unsigned *n, unsigned *out) {
    GUARD;
    if (*n < 1 || !out) { *n = 1; return INSUFFICIENT_SIZE; }
    *n = 1;
    out[0] = MEMORY_MHZ;
    return OK;
}

int nvmlDeviceGetSupportedGraphicsClocks(void *handle, unsigned memory, unsigned *n, unsigned *out) {
    GUARD;
    unsigned count = r->fixed.num_clocks;
    if (memory != MEMORY_MHZ) return NOT_FOUND;
    if (*n < count || !out) { *n = count; return INSUFFICIENT_SIZE; }
    for (unsigned i = 0; i < count; i++) out[i] = r->fixed.clocks_mhz[count - 1 - i];
    *n = count;
    return OK;
}

int nvmlDeviceGetClockInfo(void *handle, int type, unsigned *mhz) {
    GUARD;
    if (type == 2) { *mhz = MEMORY_MHZ; return OK; }
    if (type != 0 && type != 1) return INVALID;
    Look look;
    voltana_look(r, &look);
    *mhz = r->faults.stuck_mhz ? r->faults.stuck_mhz : look.clock_mhz;
    return OK;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *handle, unsigned long long *bits) {
    GUARD;
    Look look;
    voltana_look(r, &look);
    unsigned asked = look.locked_mhz ? look.locked_mhz : r->fixed.clocks_mhz[r->fixed.num_clocks - 1];
    *bits = r->faults.throttle_bits | (look.clock_mhz < asked ? 0x4u : 0u); /* software power cap */
    return OK;
}

/* --- settings --------------------------------------------------------------------------------- */

int nvmlDeviceSetGpuLockedClocks(void *handle, unsigned low, unsigned high) {
    GUARD;
    return low == high && low ? voltana_lock(r, low) : INVALID;
}
int nvmlDeviceResetGpuLockedClocks(void *handle) { GUARD; return voltana_lock(r, 0); }

static unsigned limit_of(Record *r) {
    Look look;
    voltana_look(r, &look);
    return look.limit_mw;
}
int nvmlDeviceGetPowerManagementLimit(void *handle, unsigned *mw) { GUARD; *mw = limit_of(r); return OK; }
int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *mw) { GUARD; *mw = limit_of(r); return OK; }
int nvmlDeviceGetPowerManagementLimitConstraints(void *handle, unsigned *low, unsigned *high) {
    GUARD;
    *low = r->fixed.limit_low_mw;
    *high = r->fixed.limit_high_mw;
    return OK;
}
int nvmlDeviceSetPowerManagementLimit(void *handle, unsigned mw) { GUARD; return voltana_limit(r, mw); }
