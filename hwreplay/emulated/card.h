/* The mapped file of the emulated cards: one header page, then one record a card.
 *
 * Time in a record is seconds of CLOCK_MONOTONIC since the file was made. Where time is dilated
 * (dilate.c) that clock is the slowed one, for every process that opens the file: one whose
 * VOLTANA_DILATION is not the maker's is refused.
 * Everything that moves lies in a ledger of which there are two: a writer, holding the record's
 * robust mutex, fills the one that is not in use and then turns `active` over, so that a process
 * killed anywhere leaves the old state or the new one. card.py mirrors this. */
#ifndef VOLTANA_CARD_H
#define VOLTANA_CARD_H
#include <pthread.h>
#include <stdint.h>

#define CARD_MAGIC 0x44524143544c4f56ULL /* "VOLTCARD" */
#define CARD_VERSION 1
#define CARD_PAGE 4096
#define CARD_BYTES 16384
#define MAX_CARDS 64
#define MAX_CLOCKS 256
#define MAX_PENDING 16
#define MAX_PROCESSES 16
#define RING 256

typedef struct {
    uint64_t magic;
    uint32_t version, num_cards, record_bytes, reserved;
} Header;

/* What never changes once the file is made; `checksum` (FNV-1a) is of these bytes. */
typedef struct {
    char name[96], uuid[96];
    uint64_t memory_bytes;
    char dilation[96];      /* VOLTANA_DILATION of who made the file; empty: none */
    int64_t epoch_ns;       /* CLOCK_MONOTONIC of second 0 */
    double grid_s;          /* readings stand on this grid of time */
    uint32_t period_grids;  /* the power reading is renewed so often */
    uint32_t window_grids;  /* and is the mean over so long before that */
    uint32_t counter_grids; /* the energy counter moves so often */
    uint32_t limit_mw, limit_low_mw, limit_high_mw;
    uint32_t num_clocks, padding;
    double unlocked_idle_w;
    uint32_t clocks_mhz[MAX_CLOCKS]; /* ascending; unlocked is the last */
    double idle_w[MAX_CLOCKS];       /* at each of them */
} Static;

typedef struct {
    double at_s;
    uint32_t clock_mhz, padding; /* 0: unlocked */
} Change;

typedef struct {
    double at_s;          /* booked up to here */
    double energy_j;      /* from second 0 to there, exact */
    double busy_s;        /* of it, within passes */
    double pass_w;        /* of the pass under way; 0: none */
    double pass_end_s;
    double sag_from_s, sag_until_s; /* the clock is held at sag_mhz or below in between */
    uint32_t sag_mhz;
    uint32_t lost;        /* 1: off the bus; draws nothing */
    uint32_t clock_mhz;   /* lock in force; 0: none */
    uint32_t wanted_mhz;  /* lock asked for last */
    uint32_t limit_mw;    /* power limit in force */
    uint32_t num_pending;
    Change pending[MAX_PENDING]; /* locks that have not taken effect, in order */
    uint64_t num_passes, num_locks, num_resets, num_limits;
} Ledger;

/* Set from outside at any time, each word for itself. */
typedef struct {
    double lock_call_s;      /* a lock or unlock call lasts so long */
    double lock_lag_s;       /* and takes effect so long after it was made */
    double frozen_s;         /* >= 0: the record's time stands here (tests) */
    uint32_t lock_error;     /* NVML code that lock, unlock and limit answer; 0: they work */
    uint32_t energy_mode;    /* 0: counter, 1: unsupported, 2: it falls */
    uint32_t mig_mode;       /* 0: the card has none, 1: off, 2: on */
    uint32_t throttle_bits;  /* besides what a sag gives */
    uint32_t temperature_c;  /* 0: follows power */
    uint32_t stuck_mhz;      /* > 0: the clock that is read, whatever is in force */
    uint32_t processes[MAX_PROCESSES]; /* on the card; those that have ended are left out */
    uint32_t foreign_pid;    /* > 0: one more, as it is; all ones: one that NVML numbers 0 */
    uint32_t num_energy_reads;
} Faults;

typedef struct {
    uint64_t checksum;
    Static fixed;
    pthread_mutex_t mutex;
    uint32_t active, padding;
    Ledger ledger[2];
    double ring_j[RING]; /* energy at grid point n in slot n % RING */
    Faults faults;
} Record;

/* A look at a card now. */
typedef struct {
    double now_s, energy_j, busy_s, power_w;
    double next_change_s;    /* when the clock changes next by what is known now; infinity: never */
    uint32_t clock_mhz;      /* SM clock in force, never 0 */
    uint32_t locked_mhz;     /* lock in force; 0: none */
    uint32_t wanted_mhz;     /* lock asked for last */
    uint32_t lost, limit_mw, padding;
    uint64_t num_passes, num_locks, num_resets, num_limits;
} Look;

/* Every int function answers 0, or an NVML code. */
void *voltana_map(const char *path, char *why, unsigned size); /* NULL: `why` says it */
void voltana_unmap(void *header);
int voltana_format(const char *path); /* a file written by Python: mutexes, epoch, checksums */
Record *voltana_record(void *header, unsigned index);
unsigned voltana_record_bytes(void);
void voltana_look(Record *record, Look *look);
void voltana_begin_pass(Record *record, double power_w, double duration_s);
void voltana_end_pass(Record *record);
void voltana_sag(Record *record, unsigned clock_mhz, double duration_s);
void voltana_set_lost(Record *record, unsigned lost);
int voltana_lock(Record *record, unsigned clock_mhz); /* 0 unlocks */
int voltana_limit(Record *record, unsigned limit_mw);
double voltana_reading_w(Record *record);
double voltana_counter_j(Record *record);
#endif
