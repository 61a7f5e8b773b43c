-- Crosses off an order that a worker took, or makes it due again. Where an app gave the order again meanwhile, its due
-- time is another, and it stays as it is.
-- KEYS  1 orders  2 their tries
-- ARGV  1 order  2 its due time when it was taken  3 ms until it is due again, '' if it is done
--       4 '0': the try does not count
-- returns 1 crossed off or put off, 0 it was asked for again
-- flags: allow-oom
-- include: time

if redis.call('ZSCORE', KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
if ARGV[3] == '' then
  redis.call('ZREM', KEYS[1], ARGV[1])
  redis.call('HDEL', KEYS[2], ARGV[1])
else
  redis.call('ZADD', KEYS[1], plain(now_us() + 1 + tonumber(ARGV[3]) * 1000), ARGV[1])
  if ARGV[4] == '0' and redis.call('HGET', KEYS[2], ARGV[1]) then
    redis.call('HINCRBY', KEYS[2], ARGV[1], -1)
  end
end
return 1
