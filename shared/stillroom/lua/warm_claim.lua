-- Claims a period of a loader's warm-ups: one of all workers gets it.
-- KEYS  1 claim: the number of the newest period that a worker has
-- ARGV  1 length of a period, ms
-- returns 1 it is the caller's, 0 another worker has it
-- include: time

local period = plain(math.floor(now_us() / 1000 / tonumber(ARGV[1])))
if redis.call('GET', KEYS[1]) == period then
  return 0
end
redis.call('SET', KEYS[1], period, 'PX', plain(2 * tonumber(ARGV[1])))
return 1
