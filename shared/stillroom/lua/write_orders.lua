-- Writes down work that an app wants done in the background. An order that waits already stays one; it is due now.
-- KEYS  1 orders  2 their tries
-- ARGV  1 most orders that may wait  2 how long they are kept, ms  3… orders
-- returns 1 written down, 0 too many wait already, and none was written down
-- include: time

local new = 0
for i = 3, #ARGV do
  new = new + (redis.call('ZSCORE', KEYS[1], ARGV[i]) and 0 or 1)
end
if redis.call('ZCARD', KEYS[1]) + new > tonumber(ARGV[1]) then
  return 0
end
local now = plain(now_us())
for i = 3, #ARGV do
  redis.call('ZADD', KEYS[1], now, ARGV[i])
  redis.call('HDEL', KEYS[2], ARGV[i])
end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
