-- A worker is at work. Those of whom nothing was heard for a while are forgotten.
-- KEYS  1 workers
-- ARGV  1 which worker  2 how long it is remembered, ms
-- returns 1
-- include: clock own

local now = math.floor(now_us() / 1000)
own(KEYS[1], 'zset')
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', plain(now - tonumber(ARGV[2])))
redis.call('ZREMRANGEBYSCORE', KEYS[1], '(' .. plain(now), '+inf') -- from before the clock stepped back
redis.call('ZADD', KEYS[1], plain(now), ARGV[1])
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
