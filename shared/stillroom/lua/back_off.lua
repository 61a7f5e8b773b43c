-- Backs a failed refresh off: no refresh is ordered before the delay is over. The count of failures outlives the delay,
-- so that the next failure waits twice as long.
-- KEYS  1 lease
-- ARGV  1 the lease's value, ending in .<failures>  2 first delay ms  3 longest delay ms
--       4 jitter, 500 to 1000 thousandths of the delay  5 how long the count is kept after it, ms
-- returns the delay in ms, 0 if the lease was not ours

if redis.call('GET', KEYS[1]) ~= ARGV[1] then
  return 0
end
local failures = tonumber(string.match(ARGV[1], '%.(%d+)$'))
local delay = math.min(tonumber(ARGV[3]), tonumber(ARGV[2]) * 2 ^ math.min(failures, 30))
delay = math.max(1, math.floor(delay * tonumber(ARGV[4]) / 1000))
local value = string.format('backoff.%d.%d', delay, failures + 1)
redis.call('SET', KEYS[1], value, 'PX', delay + tonumber(ARGV[5]))
return delay
