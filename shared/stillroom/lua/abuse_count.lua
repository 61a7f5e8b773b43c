-- Counts one event for one rule and one group. What is counted are members with the time they were last seen, so an
-- event that is read twice is one event, and a user who is tried twice is one user.
-- The counts have a limit in number, too: a million addresses, one event each, push out those that grew longest ago.
-- KEYS  1 the group's count  2 groups
-- ARGV  1 member, or '' only to look  2 when, ms  3 window, ms  4 how long the count is kept, ms  5 most members
--       6 most groups  7 1 if members are numbers of windows, and the count is how many in a row  8 threshold
-- returns {count}; from the threshold on {count, first ms, last ms, up to five of the newest members …}
-- flags: allow-oom
-- include: clock

local GROUP_MS = 86400000 -- no count is kept longer; a longer one is only dropped too soon
local MISSED = 2 -- windows in a row may be this far apart: an event late in one and early in the next but one
local key, groups, at = KEYS[1], KEYS[2], tonumber(ARGV[2])

local function make_room(now)
  redis.call('ZREMRANGEBYSCORE', groups, '-inf', plain(now - GROUP_MS))
  redis.call('PEXPIRE', groups, plain(GROUP_MS))
  if redis.call('ZCARD', groups) > tonumber(ARGV[6]) then
    redis.call('UNLINK', redis.call('ZPOPMIN', groups)[1])
  end
end

local function add(member)
  redis.call('ZADD', key, 'GT', ARGV[2], member)
  redis.call('ZREMRANGEBYRANK', key, 0, -tonumber(ARGV[5]) - 1)
  redis.call('PEXPIRE', key, ARGV[4])
  local now = math.floor(now_us() / 1000)
  if redis.call('ZADD', groups, plain(now), key) == 1 then
    make_room(now)
  end
end

local function in_a_row(first)
  local windows = redis.call('ZREVRANGEBYSCORE', key, '+inf', first)
  for i = 2, #windows do
    if tonumber(windows[i - 1]) - tonumber(windows[i]) > MISSED then
      return i - 1
    end
  end
  return #windows
end

-- ZREMRANGEBYSCORE first: an old server that is full refuses a script's first write if it takes memory.
redis.call('ZREMRANGEBYSCORE', key, '-inf', plain(at - tonumber(ARGV[4])))
if ARGV[1] ~= '' then
  add(ARGV[1])
end
local first = '(' .. plain(at - tonumber(ARGV[3]))
local count = ARGV[7] == '1' and in_a_row(first) or redis.call('ZCOUNT', key, first, '+inf')
if count < tonumber(ARGV[8]) then
  return {count}
end
local newest = redis.call('ZREVRANGE', key, 0, math.min(count, 5) - 1)
local oldest = redis.call('ZREVRANGE', key, count - 1, count - 1, 'WITHSCORES')[2]
return {count, oldest, redis.call('ZSCORE', key, newest[1]), unpack(newest)}
