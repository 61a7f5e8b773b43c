-- Takes the order that is due the longest, and counts the try: an order that kills its worker must not be tried for
-- ever. The order stays written down and becomes due again, should its worker die. An order that is due later than the
-- longest delay was written before the clock was put back: it is due now.
-- KEYS  1 orders  2 their tries
-- ARGV  1 ms until it is due again  2 the longest delay, ms  3 how long orders are kept, ms
--       4 due no later than this, µs, so that a run takes each order once; 0: now
--       5 ms until it is due again if it is to load: as long as a load may take
-- returns {order, the due time that says it is ours, tries with this one, server time in µs}, or nil if nothing is due
-- flags: allow-oom
-- include: time

local now = now_us()
local by = ARGV[4] == '0' and plain(now) or ARGV[4]
local order = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', by, 'LIMIT', 0, 1)[1]
if not order then
  local latest = plain(now + math.max(tonumber(ARGV[2]), tonumber(ARGV[5])) * 1000)
  order = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. latest, '+inf', 'LIMIT', 0, 1)[1]
end
if not order then
  return false
end
local held = string.sub(order, 1, 5) == 'load ' and ARGV[5] or ARGV[1]
local due = plain(now + tonumber(held) * 1000)
redis.call('ZADD', KEYS[1], due, order)
local tries = redis.call('HINCRBY', KEYS[2], order, 1)
redis.call('PEXPIRE', KEYS[1], ARGV[3])
redis.call('PEXPIRE', KEYS[2], ARGV[3])
return {order, due, tries, plain(now)}
