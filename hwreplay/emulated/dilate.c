/* Time dilation: preloaded into every process of a run, it makes their clocks go slower.
 *
 * VOLTANA_DILATION="FACTOR MONOTONIC_NS REALTIME_NS" (the instants at which both times agree). Clocks
 * read as if 1/FACTOR of the time had gone by since then, and waits last FACTOR times as long, so that
 * nothing in a process needs to know: time limits, heartbeats, control intervals and rates all scale.
 * The calls below are those that CPython, libuv, ZeroMQ and the C++ library wait with; a wait that is
 * left out would end too early, which a test looks for. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdlib.h>
#include <stdio.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

typedef struct timespec Time;
static double factor = 1;
static long long origin_ns[2]; /* of realtime (0) and the monotonic clocks (1) */

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static long long ns_of(const Time *t) { return t->tv_sec * 1000000000LL + t->tv_nsec; }

static Time time_of(long long ns) {
    return (Time){.tv_sec = ns / 1000000000LL, .tv_nsec = ns % 1000000000LL};
}

/* 0, 1, or -1 for a clock that is no wall time (of a process or a thread). */
static int kind_of(clockid_t clock) {
    if (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE) return 0;
    if (clock == CLOCK_MONOTONIC || clock == CLOCK_MONOTONIC_RAW || clock == CLOCK_MONOTONIC_COARSE
        || clock == CLOCK_BOOTTIME)
        return 1;
    return -1;
}

/* Raw and boot time may stand elsewhere than monotonic time: they are made to agree with it. */
static clockid_t base_of(int kind) { return kind ? CLOCK_MONOTONIC : CLOCK_REALTIME; }

static Time slow(const Time *t, int kind) {
    return time_of(origin_ns[kind] + (long long)((ns_of(t) - origin_ns[kind]) / factor));
}

static Time fast(const Time *t, int kind) {
    return time_of(origin_ns[kind] + (long long)((ns_of(t) - origin_ns[kind]) * factor));
}

static Time longer(const Time *t) { return time_of((long long)(ns_of(t) * factor)); }

static int ms_longer(int ms) { return ms > 0 ? (int)(ms * factor) : ms; }

/* A condition variable does not say which clock its limit is on; both stand decades apart. */
static int kind_of_limit(const Time *t) { return ns_of(t) < origin_ns[0] / 2; }

__attribute__((constructor)) static void begin(void) {
    const char *text = getenv("VOLTANA_DILATION");
    if (text) sscanf(text, "%lf %lld %lld", &factor, &origin_ns[1], &origin_ns[0]);
}

int clock_gettime(clockid_t clock, Time *t) {
    REAL(clock_gettime);
    int kind = kind_of(clock);
    if (kind < 0 || factor == 1) return real(clock, t);
    int code = real(base_of(kind), t);
    if (!code) *t = slow(t, kind);
    return code;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
    (void)zone;
    Time now;
    int code = clock_gettime(CLOCK_REALTIME, &now);
    *t = (struct timeval){.tv_sec = now.tv_sec, .tv_usec = now.tv_nsec / 1000};
    return code;
}

time_t time(time_t *out) {
    Time now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (out) *out = now.tv_sec;
    return now.tv_sec;
}

int clock_nanosleep(clockid_t clock, int flags, const Time *t, Time *left) {
    REAL(clock_nanosleep);
    int kind = kind_of(clock);
    if (kind < 0) return real(clock, flags, t, left);
    Time wait = flags & TIMER_ABSTIME ? fast(t, kind) : longer(t);
    int code = real(base_of(kind), flags, &wait, left);
    if (code == EINTR && left && !(flags & TIMER_ABSTIME)) *left = time_of(ns_of(left) / factor);
    return code;
}

int nanosleep(const Time *t, Time *left) {
    int code = clock_nanosleep(CLOCK_MONOTONIC, 0, t, left);
    if (!code) return 0;
    errno = code;
    return -1;
}

int usleep(useconds_t us) {
    Time t = time_of(us * 1000LL);
    return nanosleep(&t, NULL);
}

unsigned sleep(unsigned s) {
    Time t = {.tv_sec = s}, left = {0};
    return nanosleep(&t, &left) ? (unsigned)left.tv_sec : 0;
}

int poll(struct pollfd *all, nfds_t num, int ms) {
    REAL(poll);
    return real(all, num, ms_longer(ms));
}

int ppoll(struct pollfd *all, nfds_t num, const Time *t, const sigset_t *mask) {
    REAL(ppoll);
    Time wait = t ? longer(t) : (Time){0};
    return real(all, num, t ? &wait : NULL, mask);
}

int select(int num, fd_set *in, fd_set *out, fd_set *bad, struct timeval *t) {
    REAL(select);
    if (!t) return real(num, in, out, bad, NULL);
    Time wait = longer(&(Time){.tv_sec = t->tv_sec, .tv_nsec = t->tv_usec * 1000});
    struct timeval given = {.tv_sec = wait.tv_sec, .tv_usec = wait.tv_nsec / 1000};
    return real(num, in, out, bad, &given);
}

int pselect(int num, fd_set *in, fd_set *out, fd_set *bad, const Time *t, const sigset_t *mask) {
    REAL(pselect);
    Time wait = t ? longer(t) : (Time){0};
    return real(num, in, out, bad, t ? &wait : NULL, mask);
}

int epoll_wait(int fd, struct epoll_event *all, int most, int ms) {
    REAL(epoll_wait);
    return real(fd, all, most, ms_longer(ms));
}

int epoll_pwait(int fd, struct epoll_event *all, int most, int ms, const sigset_t *mask) {
    REAL(epoll_pwait);
    return real(fd, all, most, ms_longer(ms), mask);
}

int epoll_pwait2(int fd, struct epoll_event *all, int most, const Time *t, const sigset_t *mask) {
    REAL(epoll_pwait2);
    Time wait = t ? longer(t) : (Time){0};
    return real(fd, all, most, t ? &wait : NULL, mask);
}

int sem_timedwait(sem_t *sem, const Time *until) {
    REAL(sem_timedwait);
    Time limit = fast(until, 0);
    return real(sem, &limit);
}

int sem_clockwait(sem_t *sem, clockid_t clock, const Time *until) {
    REAL(sem_clockwait);
    Time limit = fast(until, kind_of(clock));
    return real(sem, clock, &limit);
}

int pthread_mutex_timedlock(pthread_mutex_t *mutex, const Time *until) {
    REAL(pthread_mutex_timedlock);
    Time limit = fast(until, 0);
    return real(mutex, &limit);
}

int pthread_mutex_clocklock(pthread_mutex_t *mutex, clockid_t clock, const Time *until) {
    REAL(pthread_mutex_clocklock);
    Time limit = fast(until, kind_of(clock));
    return real(mutex, clock, &limit);
}

int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex, const Time *until) {
    static __typeof__(&pthread_cond_timedwait) real;
    if (!real) real = (__typeof__(real))dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    if (!real) real = (__typeof__(real))dlsym(RTLD_NEXT, "pthread_cond_timedwait");
    Time limit = fast(until, kind_of_limit(until));
    return real(cond, mutex, &limit);
}

int pthread_cond_clockwait(pthread_cond_t *cond, pthread_mutex_t *mutex, clockid_t clock,
                           const Time *until) {
    REAL(pthread_cond_clockwait);
    Time limit = fast(until, kind_of(clock));
    return real(cond, mutex, clock, &limit);
}
