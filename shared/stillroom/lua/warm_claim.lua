-- Claims a period of a loader's warm-ups: one of all workers gets it. A claim that arrives twice is one.
-- KEYS  1 claim: `<number of the newest period that a worker has> <the claim's token>`
-- ARGV  1 length of a period, ms  2 token (hexadecimal)
-- returns the claim as it is kept; nil if another worker has the period
-- include: time

local period = plain(math.floor(now_us() / 1000 / tonumber(ARGV[1])))
local held, token = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (%x+)$')
if held == period and token ~= ARGV[2] then
  return false
end
local claim = period .. ' ' .. ARGV[2]
redis.call('SET', KEYS[1], claim, 'PX', plain(2 * tonumber(ARGV[1])))
return claim
