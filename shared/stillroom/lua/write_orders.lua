-- Writes down what an app wants done in the background.
-- KEYS  1 todo
-- ARGV  1 most work that may wait  2 how long it is kept, ms  3… members
-- returns 1 written down, 0 too much waits already
-- include: clock

if redis.call('ZCARD', KEYS[1]) + #ARGV - 2 > tonumber(ARGV[1]) then
  return 0
end
local now = plain(math.floor(now_us() / 1000))
for i = 3, #ARGV do
  redis.call('ZADD', KEYS[1], now, ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
