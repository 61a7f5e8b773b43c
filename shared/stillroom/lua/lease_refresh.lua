-- Takes the lease for a refresh of the entry the caller saw: one refresh per stale period.
-- KEYS  1 lease  2 entry
-- ARGV  1 token  2 lease ms  3 how the stale entry begins (another beginning: it was refreshed since)
--       4 not after (server time, µs)
-- returns the lease's value, `refresh.<token>.<failures so far>`, or nil if there is nothing to do
-- include: clock

if now_us() > tonumber(ARGV[4]) or redis.call('GETRANGE', KEYS[2], 0, #ARGV[3] - 1) ~= ARGV[3] then
  return false
end
local failures = '0'
local holder = redis.call('GET', KEYS[1])
if holder then
  local due, count = string.match(holder, '^backoff%.(%d+)%.(%d+)$')
  if not due or tonumber(due) * 1000 > now_us() then
    return false
  end
  failures = count
end
local value = 'refresh.' .. ARGV[1] .. '.' .. failures
redis.call('SET', KEYS[1], value, 'PX', ARGV[2])
return value
