-- Writes down that a scheduled task has ended well.
-- KEYS  1 ticks
-- ARGV  1 task  2 how long they are remembered, ms
-- returns 1
-- include: time own
-- flags: allow-oom

own(KEYS[1], 'hash')
redis.call('HSET', KEYS[1], ARGV[1], plain(math.floor(now_us() / 1000)))
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
