-- Takes one of a loader's places, so that no more than its budget of loads run at once, in all processes. A place is
-- held no longer than a load may take. A load that finds none queues for a moment; the queue is as long as there are
-- places. Members that run out later than their own lease could were written before the clock was put back; another
-- release, or a process with another setting, may give its loads longer leases.
-- KEYS  1 places (zset: load → until, ms)  2 queue (the same)  3 lease
-- ARGV  1 the lease's value: the load  2 how many places  3 for how long, ms  4 how long one may queue, ms
--       5 while the caller waits (see is_late): a place that nobody gives back would keep others from loading
--       6… the leases of the loads that wait for this one: it shares the place of one of them
-- returns 1 taken, and the lease begins anew; 0 queued: ask again; -1 too late; -2 the queue is full
-- include: time in_time

if is_late(ARGV[5]) then
  return -1
end
local now = math.floor(now_us() / 1000)
local limit = tonumber(ARGV[2])

-- Drops who ends later than from now on it could. The value of a load's lease says how long that is (lib/lease.lua).
local function clear(key, longest)
  redis.call('ZREMRANGEBYSCORE', key, '-inf', plain(now))
  local late = redis.call('ZRANGEBYSCORE', key, '(' .. plain(now + longest), '+inf', 'WITHSCORES')
  for i = 1, #late, 2 do
    local given = key == KEYS[1] and string.match(late[i], '^%a+%.%x+%.(%d+)') or longest
    if tonumber(late[i + 1]) > now + tonumber(given) then
      redis.call('ZREM', key, late[i])
    end
  end
end

local function join(key, longest)
  redis.call('ZADD', key, plain(now + longest), ARGV[1])
  if redis.call('PTTL', key) < longest then
    redis.call('PEXPIRE', key, longest)
  end
end

clear(KEYS[1], tonumber(ARGV[3]))
clear(KEYS[2], tonumber(ARGV[4]))
for i = 6, #ARGV do
  if redis.call('ZSCORE', KEYS[1], ARGV[i]) then
    return 1
  end
end
if redis.call('ZSCORE', KEYS[1], ARGV[1]) or redis.call('ZCARD', KEYS[1]) < limit then
  join(KEYS[1], tonumber(ARGV[3]))
  redis.call('ZREM', KEYS[2], ARGV[1])
  if redis.call('GET', KEYS[3]) == ARGV[1] then
    redis.call('PEXPIRE', KEYS[3], ARGV[3])
  end
  return 1
end
if redis.call('ZSCORE', KEYS[2], ARGV[1]) or redis.call('ZCARD', KEYS[2]) < limit then
  join(KEYS[2], tonumber(ARGV[4]))
  return 0
end
return -2
