-- Takes the lease for a refresh of the entry the caller saw: one refresh per stale period.
-- KEYS  1 lease  2 entry
-- ARGV  1 token  2 lease ms  3 the first bytes of the stale entry (others: it was refreshed since)
--       4 while the caller waits (see is_late)  5 how long the count of failures is kept after a backoff, ms
-- returns the lease's value, `refresh.<token>.<lease ms>.<failures so far>`; nil if there is nothing to do; -1 too late
-- include: time lease in_time

if is_late(ARGV[4]) then
  return -1
end
if redis.call('GETRANGE', KEYS[2], 0, #ARGV[3] - 1) ~= ARGV[3] then
  return false
end
local failures = '0'
local holder = redis.call('GET', KEYS[1])
if holder then
  local delay, count = string.match(holder, '^backoff%.(%d+)%.(%d+)$')
  if delay then
    local left = redis.call('PTTL', KEYS[1]) - tonumber(ARGV[5])
    if left > 0 and left <= tonumber(delay) then -- a longer rest means that the clock was put back
      return false
    end
    failures = count
  elseif holds(KEYS[1], holder, ARGV[2]) then
    return false
  end
end
local value = 'refresh.' .. ARGV[1] .. '.' .. ARGV[2] .. '.' .. failures
redis.call('SET', KEYS[1], value, 'PX', ARGV[2])
return value
