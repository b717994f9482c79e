/* Clocks and energy of an emulated card, booked exactly and lazily: whoever looks, books. */
#define _GNU_SOURCE
#include "card.h"
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(Record) <= CARD_BYTES, "a record must fit its place");

/* --- the file --------------------------------------------------------------------------------- */

static uint64_t checksum_of(const Record *r) {
    const unsigned char *bytes = (const unsigned char *)&r->fixed;
    uint64_t hash = 0xcbf29ce484222325ULL;
    for (size_t i = 0; i < sizeof r->fixed; i++) hash = (hash ^ bytes[i]) * 0x100000001b3ULL;
    return hash;
}

unsigned voltana_record_bytes(void) { return sizeof(Record); }

Record *voltana_record(void *header, unsigned index) {
    return (Record *)((char *)header + CARD_PAGE + (size_t)index * CARD_BYTES);
}

static size_t file_bytes(unsigned num_cards) { return CARD_PAGE + (size_t)num_cards * CARD_BYTES; }

static int is_sane(const Record *r) {
    if (r->active > 1 || r->fixed.num_clocks < 1 || r->fixed.num_clocks > MAX_CLOCKS) return 0;
    const Ledger *l = &r->ledger[r->active];
    return isfinite(l->at_s) && isfinite(l->energy_j) && l->num_pending <= MAX_PENDING;
}

static const char *dilation_here(void) {
    const char *text = getenv("VOLTANA_DILATION");
    return text ? text : "";
}

static const char *fault_of(const Header *h, size_t size) {
    static _Thread_local char text[128];
    if (size < sizeof *h || h->magic != CARD_MAGIC) return "is not a file of emulated cards";
    if (h->version != CARD_VERSION || h->record_bytes != sizeof(Record)) {
        snprintf(text, sizeof text, "is of version %u (%u bytes a card), the library of %u (%zu)",
                 h->version, h->record_bytes, CARD_VERSION, sizeof(Record));
        return text;
    }
    if (h->num_cards < 1 || h->num_cards > MAX_CARDS || size < file_bytes(h->num_cards))
        return "has been cut short";
    for (unsigned i = 0; i < h->num_cards; i++) {
        const Record *r = voltana_record((void *)h, i);
        if (r->checksum != checksum_of(r) || !is_sane(r)) {
            snprintf(text, sizeof text, "is damaged: card %u does not add up", i);
            return text;
        }
        if (strcmp(r->fixed.dilation, dilation_here()))
            return "was made in a time of another dilation";
    }
    return NULL;
}

static void *map_file(const char *path, size_t *size) {
    int fd = open(path, O_RDWR | O_CLOEXEC);
    if (fd < 0) return NULL;
    struct stat found;
    void *base = MAP_FAILED;
    if (fstat(fd, &found) == 0 && found.st_size >= CARD_PAGE) {
        *size = (size_t)found.st_size;
        base = mmap(NULL, *size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    } else {
        errno = ENODATA;
    }
    int kept = errno;
    close(fd);
    errno = kept;
    return base == MAP_FAILED ? NULL : base;
}

void *voltana_map(const char *path, char *why, unsigned why_size) {
    size_t size = 0;
    const char *fault;
    void *base = map_file(path, &size);
    fault = base ? fault_of(base, size) : strerror(errno);
    if (!fault) return base;
    snprintf(why, why_size, "the emulated cards' file must be whole, %s %s: make it anew",
             path, fault);
    if (base) munmap(base, size);
    return NULL;
}

void voltana_unmap(void *header) {
    munmap(header, file_bytes(((Header *)header)->num_cards));
}

int voltana_format(const char *path) {
    size_t size = 0;
    Header *h = map_file(path, &size);
    if (!h || size < file_bytes(h->num_cards)) return 1;
    pthread_mutexattr_t how;
    pthread_mutexattr_init(&how);
    pthread_mutexattr_setpshared(&how, PTHREAD_PROCESS_SHARED);
    pthread_mutexattr_setrobust(&how, PTHREAD_MUTEX_ROBUST);
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    for (unsigned i = 0; i < h->num_cards; i++) {
        Record *r = voltana_record(h, i);
        snprintf(r->fixed.dilation, sizeof r->fixed.dilation, "%s", dilation_here());
        r->fixed.epoch_ns = now.tv_sec * 1000000000LL + now.tv_nsec;
        r->checksum = checksum_of(r);
        pthread_mutex_init(&r->mutex, &how);
    }
    h->version = CARD_VERSION;
    h->record_bytes = sizeof(Record);
    h->magic = CARD_MAGIC;
    munmap(h, size);
    return 0;
}

/* --- clocks and power of a ledger ------------------------------------------------------------- */

static double now_s(const Record *r) {
    struct timespec now;
    if (r->faults.frozen_s >= 0) return r->faults.frozen_s;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (now.tv_sec * 1000000000LL + now.tv_nsec - r->fixed.epoch_ns) * 1e-9;
}

static unsigned top_mhz(const Record *r) { return r->fixed.clocks_mhz[r->fixed.num_clocks - 1]; }

static int is_sagging(const Ledger *l) {
    return l->sag_mhz && l->sag_from_s <= l->at_s && l->at_s < l->sag_until_s;
}

static unsigned clock_of(const Record *r, const Ledger *l) {
    unsigned clock = l->clock_mhz ? l->clock_mhz : top_mhz(r);
    return is_sagging(l) && l->sag_mhz < clock ? l->sag_mhz : clock;
}

static double idle_of(const Record *r, const Ledger *l) {
    const Static *s = &r->fixed;
    unsigned clock = clock_of(r, l), i = 0;
    if (!l->clock_mhz && clock == top_mhz(r)) return s->unlocked_idle_w;
    while (i < s->num_clocks && s->clocks_mhz[i] < clock) i++;
    if (i == s->num_clocks) return s->idle_w[i - 1];
    if (i == 0 || s->clocks_mhz[i] == clock) return s->idle_w[i];
    double low = s->clocks_mhz[i - 1], share = (clock - low) / (s->clocks_mhz[i] - low);
    return s->idle_w[i - 1] + share * (s->idle_w[i] - s->idle_w[i - 1]);
}

static int is_in_pass(const Ledger *l) { return l->pass_w > 0 && l->at_s < l->pass_end_s; }

static double power_of(const Record *r, const Ledger *l) {
    if (l->lost) return 0;
    return is_in_pass(l) ? l->pass_w : idle_of(r, l);
}

/* When the clock changes next by what is known now. */
static double next_clock_s(const Ledger *l) {
    double next = l->num_pending ? l->pending[0].at_s : INFINITY;
    if (l->sag_mhz && l->sag_from_s > l->at_s) next = fmin(next, l->sag_from_s);
    if (l->sag_mhz && l->sag_until_s > l->at_s) next = fmin(next, l->sag_until_s);
    return next;
}

/* --- booking ---------------------------------------------------------------------------------- */

/* Energy at the grid points of (l->at_s, until], at one power. Written again alike by the next one
 * if this process is killed before it turns its ledger over. */
static void book_grid(Record *r, const Ledger *l, double until, double power) {
    double grid = r->fixed.grid_s;
    uint64_t n = (uint64_t)(l->at_s / grid), last = (uint64_t)(until / grid) + 1;
    while (n * grid <= l->at_s) n++;
    if (last > n + RING) n = last - RING;
    for (; n * grid <= until; n++) r->ring_j[n % RING] = l->energy_j + power * (n * grid - l->at_s);
}

static void take_effect(Ledger *l) {
    while (l->num_pending && l->pending[0].at_s <= l->at_s) {
        l->clock_mhz = l->pending[0].clock_mhz;
        memmove(l->pending, l->pending + 1, --l->num_pending * sizeof *l->pending);
    }
}

static void advance(Record *r, Ledger *l, double now) {
    take_effect(l);
    while (l->at_s < now) {
        int busy = is_in_pass(l) && !l->lost;
        double power = power_of(r, l), until = fmin(now, next_clock_s(l));
        if (is_in_pass(l)) until = fmin(until, l->pass_end_s);
        book_grid(r, l, until, power);
        l->energy_j += power * (until - l->at_s);
        if (busy) l->busy_s += until - l->at_s;
        l->at_s = until;
        take_effect(l);
    }
    if (!is_in_pass(l)) l->pass_w = 0;
}

/* Take the card, with a copy of its state as it is now. A holder that was killed has left one. */
static Ledger take(Record *r) {
    if (pthread_mutex_lock(&r->mutex) == EOWNERDEAD) pthread_mutex_consistent(&r->mutex);
    Ledger l = r->ledger[r->active];
    advance(r, &l, now_s(r));
    return l;
}

static void give(Record *r, const Ledger *l) {
    unsigned other = 1 - r->active;
    r->ledger[other] = *l;
    __atomic_store_n(&r->active, other, __ATOMIC_RELEASE);
    pthread_mutex_unlock(&r->mutex);
}

/* --- what the engine does --------------------------------------------------------------------- */

void voltana_look(Record *r, Look *look) {
    Ledger l = take(r);
    *look = (Look){
        .now_s = l.at_s, .energy_j = l.energy_j, .busy_s = l.busy_s, .power_w = power_of(r, &l),
        .next_change_s = next_clock_s(&l), .clock_mhz = clock_of(r, &l), .locked_mhz = l.clock_mhz,
        .wanted_mhz = l.wanted_mhz, .lost = l.lost, .limit_mw = l.limit_mw,
        .num_passes = l.num_passes, .num_locks = l.num_locks, .num_resets = l.num_resets,
        .num_limits = l.num_limits,
    };
    give(r, &l);
}

void voltana_begin_pass(Record *r, double power_w, double duration_s) {
    Ledger l = take(r);
    l.num_passes += !is_in_pass(&l);
    l.pass_w = power_w;
    l.pass_end_s = l.at_s + duration_s;
    give(r, &l);
}

void voltana_end_pass(Record *r) {
    Ledger l = take(r);
    l.pass_w = 0;
    give(r, &l);
}

void voltana_sag(Record *r, unsigned clock_mhz, double duration_s) {
    Ledger l = take(r);
    l.sag_mhz = clock_mhz;
    l.sag_from_s = l.at_s;
    l.sag_until_s = l.at_s + duration_s;
    give(r, &l);
}

void voltana_set_lost(Record *r, unsigned lost) {
    Ledger l = take(r);
    if (l.lost && !lost) { /* back after a reset: no lock has outlived it */
        l.clock_mhz = l.wanted_mhz = l.num_pending = 0;
        l.pass_w = 0;
    }
    l.lost = lost != 0;
    give(r, &l);
}

/* --- what NVML does --------------------------------------------------------------------------- */

static void sleep_for(double seconds) {
    struct timespec time = {(time_t)seconds, (long)((seconds - (time_t)seconds) * 1e9)};
    while (seconds > 0 && nanosleep(&time, &time) && errno == EINTR) {}
}

static int is_supported(const Record *r, unsigned clock_mhz) {
    for (unsigned i = 0; i < r->fixed.num_clocks; i++)
        if (r->fixed.clocks_mhz[i] == clock_mhz) return 1;
    return clock_mhz == 0;
}

/* The change is under way before the call returns, as with a driver: a caller killed within the
 * call has changed the clock all the same. */
int voltana_lock(Record *r, unsigned clock_mhz) {
    int error = (int)r->faults.lock_error;
    if (!error && !is_supported(r, clock_mhz)) error = 2;
    if (!error) {
        Ledger l = take(r);
        unsigned place = l.num_pending < MAX_PENDING ? l.num_pending++ : MAX_PENDING - 1;
        double at_s = l.at_s + r->faults.lock_lag_s;
        if (place && l.pending[place - 1].at_s > at_s) at_s = l.pending[place - 1].at_s;
        l.pending[place] = (Change){.at_s = at_s, .clock_mhz = clock_mhz};
        l.wanted_mhz = clock_mhz;
        if (clock_mhz) l.num_locks++;
        else l.num_resets++;
        take_effect(&l);
        give(r, &l);
    }
    sleep_for(r->faults.lock_call_s);
    return error;
}

int voltana_limit(Record *r, unsigned limit_mw) {
    if (r->faults.lock_error) return (int)r->faults.lock_error;
    if (limit_mw < r->fixed.limit_low_mw || limit_mw > r->fixed.limit_high_mw) return 2;
    Ledger l = take(r);
    l.limit_mw = limit_mw;
    l.num_limits++;
    give(r, &l);
    return 0;
}

/* Newest grid point that a reading renewed every `every` points stands on. */
static uint64_t reading_at(const Record *r, const Ledger *l, unsigned every) {
    uint64_t n = (uint64_t)(l->at_s / r->fixed.grid_s) + 1;
    while (n * r->fixed.grid_s > l->at_s) n--;
    return n - n % every;
}

double voltana_reading_w(Record *r) {
    Ledger l = take(r);
    uint64_t end = reading_at(r, &l, r->fixed.period_grids);
    uint64_t length = end < r->fixed.window_grids ? end : r->fixed.window_grids;
    double power = power_of(r, &l);
    if (length)
        power = (r->ring_j[end % RING] - r->ring_j[(end - length) % RING])
                / (length * r->fixed.grid_s);
    if (l.lost) power = 0;
    give(r, &l);
    return power;
}

double voltana_counter_j(Record *r) {
    Ledger l = take(r);
    double energy = r->ring_j[reading_at(r, &l, r->fixed.counter_grids) % RING];
    give(r, &l);
    return energy;
}
