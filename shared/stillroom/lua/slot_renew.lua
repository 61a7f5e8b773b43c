-- Lets the holder of a slot keep it for another lease, while the slot is still the holder's.
-- KEYS  1 slots
-- ARGV  1 token  2 lease, ms
-- returns 1 renewed, 0 it is lost
-- include: time

if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then
  return 0
end
local now = now_us()
redis.call('ZADD', KEYS[1], plain(now + tonumber(ARGV[2]) * 1000), ARGV[1])
local ends = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
redis.call('PEXPIRE', KEYS[1], plain(math.ceil((tonumber(ends) - now) / 1000) + 1))
return 1
