-- Claims a period of a loader's warm-ups: one of all workers gets it. A claim that arrives twice is one.
-- Until its worker has written the orders down nobody else begins, in the next period neither. Should that worker
-- die, another one begins when its time is over, in the same period too.
-- KEYS  1 claim: `<number of the newest period that a worker has> <the claim's token>`, and until the orders are
--         written ` <until when they are to be, ms>`
-- ARGV  1 length of a period, ms  2 token (hexadecimal)  3 how long writing the orders may take, ms; 0: it is done
-- returns the claim as it is kept; nil if another worker has the period
-- include: time

local now = math.floor(now_us() / 1000)
local period = plain(math.floor(now / tonumber(ARGV[1])))
local held, token, upto = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (%x+) ?(%d*)$')
local takes = tonumber(ARGV[3])
if token == ARGV[2] then
  period = held
elseif takes == 0 then
  return false
elseif held then
  local left = (tonumber(upto) or now) - now -- more than it may take: the clock was put back
  if (left > 0 and left <= takes) or (held == period and upto == '') then
    return false
  end
end
local claim = period .. ' ' .. ARGV[2] .. (takes > 0 and ' ' .. plain(now + takes) or '')
redis.call('SET', KEYS[1], claim, 'PX', plain(2 * tonumber(ARGV[1]) + takes))
return claim
