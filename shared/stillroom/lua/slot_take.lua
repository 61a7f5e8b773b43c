-- Takes one of the slots of a lock or semaphore, in the order of asking. A waiting caller asks again and again, and
-- keeps its place in the queue as long as it does. Taking twice under one token takes one slot.
-- A server whose clock was put back would keep leases and places for longer than they were given. Here they end one
-- lease from now on, and not at once, because the holder may be alive and counts by its own clock.
-- KEYS  1 slots: token → when its lease ends, µs  2 queue: token → when it came  3 waiters: token → until when its
--       place is kept, µs  4 fence: the last fencing number
-- ARGV  1 token, `<random>.<lease in ms>`  2 how many slots there are  3 lease, ms  4 how long a place in the queue is
--       kept, ms  5 while the caller waits (see is_late)  6 most waiters  7 '1': a place is wanted
-- returns {1, fence} taken: the fence is larger than any that was given for this name before
--         {0} all slots are taken, or others were first  {-1} the caller has given up  {-2} too many wait
-- include: time in_time

if is_late(ARGV[5]) then
  return {-1}
end
local now = now_us()
local token, slots, keep_ms = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[4])
local is_waiting = ARGV[7] == '1'
local LOOKED_AT = 100 -- of those that end last, where leases from before the clock was put back are

-- Looks at what ends later than `from_ms` from now.
local function end_in_time(key, from_ms, given_ms)
  local from = '(' .. plain(now + from_ms * 1000)
  local last = redis.call('ZRANGE', key, '+inf', from, 'BYSCORE', 'REV', 'LIMIT', 0, LOOKED_AT, 'WITHSCORES')
  for i = 1, #last, 2 do
    local given = given_ms or tonumber(string.match(last[i], '%.(%d+)$'))
    if given and tonumber(last[i + 1]) > now + given * 1000 then
      redis.call('ZADD', key, plain(now + given * 1000), last[i])
    end
  end
end

for _, ended in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', plain(now))) do
  redis.call('ZREM', KEYS[1], ended)
end
for _, gone in ipairs(redis.call('ZRANGEBYSCORE', KEYS[3], '-inf', plain(now))) do
  redis.call('ZREM', KEYS[2], gone)
  redis.call('ZREM', KEYS[3], gone)
end
if not redis.call('ZSCORE', KEYS[1], token) then
  local came = redis.call('ZSCORE', KEYS[2], token)
  local ahead = redis.call('ZCOUNT', KEYS[2], '-inf', came and '(' .. came or '+inf')
  if not came then
    if is_waiting and ahead >= tonumber(ARGV[6]) then
      end_in_time(KEYS[3], keep_ms, keep_ms)
      return {-2}
    end
    local last = redis.call('ZRANGE', KEYS[2], -1, -1, 'WITHSCORES')[2] or '0'
    if is_waiting then
      redis.call('ZADD', KEYS[2], plain(math.max(now, tonumber(last) + 1)), token)
    end
  end
  if redis.call('ZCARD', KEYS[1]) + ahead >= slots then
    -- Who is in the queue asks many times a second, and looks at what outlasts the caller's lease, which is seldom any.
    end_in_time(KEYS[1], came and tonumber(ARGV[3]) or 0)
    end_in_time(KEYS[3], keep_ms, keep_ms)
    if is_waiting then
      redis.call('ZADD', KEYS[3], plain(now + keep_ms * 1000), token)
      redis.call('PEXPIRE', KEYS[2], plain(keep_ms + 1))
      redis.call('PEXPIRE', KEYS[3], plain(keep_ms + 1))
    end
    return {0}
  end
end
redis.call('ZREM', KEYS[2], token)
redis.call('ZREM', KEYS[3], token)
redis.call('ZADD', KEYS[1], plain(now + tonumber(ARGV[3]) * 1000), token)
local ends = redis.call('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')[2]
redis.call('PEXPIRE', KEYS[1], plain(math.ceil((tonumber(ends) - now) / 1000) + 1))
-- Where the last number is lost, or no such number, the server's time replaces it, so that numbers grow in any case.
local last = tonumber(redis.call('GET', KEYS[4])) or 0
local fence = math.max(now, (last < 2 ^ 53 and last or 0) + 1)
redis.call('SET', KEYS[4], plain(fence), 'PX', 86400000)
return {1, plain(fence)}
