/* LD_PRELOAD: the wall clock stands off by as many microseconds as the first 8 bytes of $CLOCK_OFFSET_FILE say. If the
 * next 8 bytes are not 0, it stands still and shows that many microseconds since 1970. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static const volatile int64_t nothing[2] = {0, 0};
static const volatile int64_t *shared_words;

static const volatile int64_t *words(void) {
  if (!shared_words) {
    const char *path = getenv("CLOCK_OFFSET_FILE");
    int file = path ? syscall(SYS_openat, AT_FDCWD, path, O_RDONLY) : -1;
    if (file < 0) return nothing;
    void *page = mmap(0, sizeof nothing, PROT_READ, MAP_SHARED, file, 0);
    if (page == MAP_FAILED) return nothing;
    shared_words = page;
  }
  return shared_words;
}

int clock_gettime(clockid_t id, struct timespec *now) {
  int failed = syscall(SYS_clock_gettime, id, now);
  if (!failed && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE)) {
    int64_t offset = words()[0], shown = words()[1];
    int64_t ns = (int64_t)now->tv_sec * 1000000000 + now->tv_nsec + offset * 1000;
    if (shown) ns = shown * 1000;
    now->tv_sec = ns / 1000000000;
    now->tv_nsec = ns % 1000000000;
  }
  return failed;
}

int gettimeofday(struct timeval *tv, void *zone) {
  struct timespec now;
  int failed = clock_gettime(CLOCK_REALTIME, &now);
  if (tv) {
    tv->tv_sec = now.tv_sec;
    tv->tv_usec = now.tv_nsec / 1000;
  }
  return failed;
}

time_t time(time_t *seconds) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (seconds) *seconds = now.tv_sec;
  return now.tv_sec;
}
