-- Keeps failed work as a dead letter until a person decides about it. Past the limit the oldest letters go. An order
-- that becomes a dead letter is crossed off by the same script, so that it is never lost in between.
-- KEYS  1 dead letters  2 orders  3 their tries (2 and 3 only for an order)
-- ARGV  1 how many letters are kept  2 for how long after the newest, s  3 kind  4 body  5 reason  6 tries
--       7 bytes of the body that were cut off  8 the order  9 its due time when it was taken (8 and 9 only for an order)
-- returns the letter's id, or nil if the order was asked for again meanwhile
-- flags: allow-oom

if KEYS[2] then
  if redis.call('ZSCORE', KEYS[2], ARGV[8]) ~= ARGV[9] then
    return false
  end
  redis.call('ZREM', KEYS[2], ARGV[8])
  redis.call('HDEL', KEYS[3], ARGV[8])
end
local id = redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[1], '*',
  'kind', ARGV[3], 'body', ARGV[4], 'reason', ARGV[5], 'tries', ARGV[6], 'cut', ARGV[7])
redis.call('EXPIRE', KEYS[1], ARGV[2])
return id
