-- Counts one event for one rule and one group. What is counted are members with the time they were last seen, so an
-- event that is read twice is one event, and a user who is tried twice is one user.
-- Events may be read late and in any order: a worker dies, and another reads what it left. So what counts is the fullest
-- window that holds the event, and not all that has come since.
-- The counts have a limit in number, too: a million addresses, one event each, push out those that grew longest ago.
-- KEYS  1 the group's count  2 groups
-- ARGV  1 member, or '' only to look  2 when by its id, ms  3 window, ms  4 how long the count is kept, ms  5 most members
--       6 most groups  7 1 if members are numbers of windows, and the count is how many in a row  8 threshold
--       9 one window of such a row, ms
-- returns {count}; from the threshold on {count, first ms, last ms, up to five of the newest members …}
-- flags: allow-oom
-- include: clock own

local GROUP_MS = 86400000 -- no count is kept longer; a longer one is only dropped too soon
local MISSED = 2 -- windows in a row may be this far apart: an event late in one and early in the next but one
local SHOWN = 5
local key, groups, window = KEYS[1], KEYS[2], tonumber(ARGV[3])
local now = math.floor(now_us() / 1000)
-- A stream's ids never go back. Where the clock has, they stand still until it has caught up, so the event is of now.
local at = math.min(tonumber(ARGV[2]), now)
local is_timely = at == tonumber(ARGV[2])

local function make_room()
  redis.call('ZREMRANGEBYSCORE', groups, '-inf', plain(now - GROUP_MS))
  redis.call('ZREMRANGEBYSCORE', groups, '(' .. plain(now), '+inf')
  redis.call('PEXPIRE', groups, plain(GROUP_MS))
  if redis.call('ZCARD', groups) > tonumber(ARGV[6]) then
    redis.call('UNLINK', redis.call('ZPOPMIN', groups)[1])
  end
end

-- An event of an uncertain time keeps the one it had when it was read first.
local function add(member)
  redis.call('ZADD', key, is_timely and 'GT' or 'NX', plain(at), member)
  redis.call('ZREMRANGEBYRANK', key, 0, -tonumber(ARGV[5]) - 1)
  redis.call('PEXPIRE', key, ARGV[4])
  if redis.call('ZADD', groups, plain(now), key) == 1 then
    make_room()
  end
end

local function in_a_row()
  local windows = redis.call('ZRANGE', key, '+inf', '(' .. plain(at - window), 'BYSCORE', 'REV')
  for i = 2, #windows do
    if tonumber(windows[i - 1]) - tonumber(windows[i]) > MISSED then
      return i - 1
    end
  end
  return #windows
end

-- → how many members the fullest window has, its first and its last ms, and the newest of them.
-- One that is only looked at ends with the event: what came after it does not count.
local function fullest()
  local newest = ARGV[1] == '' and plain(at) or '(' .. plain(at + window)
  local found = redis.call('ZRANGEBYSCORE', key, '(' .. plain(at - window), newest, 'WITHSCORES')
  local best, first, last, left = 0, 1, 0, 1
  for right = 1, #found / 2 do
    local time = tonumber(found[2 * right])
    while tonumber(found[2 * left]) <= time - window do
      left = left + 1
    end
    if right - left + 1 >= best then
      best, first, last = right - left + 1, left, right
    end
  end
  local members = {}
  for i = last, math.max(first, last - SHOWN + 1), -1 do
    members[#members + 1] = found[2 * i - 1]
  end
  return best, found[2 * first], found[2 * last], members
end

own(key, 'zset')
own(groups, 'zset')
-- First what takes no memory: an old server that is full refuses a script's first write if it does.
redis.call('ZREMRANGEBYSCORE', key, '(' .. plain(now), '+inf') -- from before the clock stepped back
redis.call('ZREMRANGEBYSCORE', key, '-inf', plain(at - tonumber(ARGV[4])))
if ARGV[1] ~= '' then
  add(ARGV[7] == '1' and plain(math.floor(at / tonumber(ARGV[9]))) or ARGV[1])
end
if ARGV[7] == '1' then
  local count = in_a_row()
  if count < tonumber(ARGV[8]) then
    return {count}
  end
  local newest = redis.call('ZREVRANGE', key, 0, math.min(count, SHOWN) - 1)
  local oldest = redis.call('ZREVRANGE', key, count - 1, count - 1, 'WITHSCORES')[2]
  return {count, oldest, redis.call('ZSCORE', key, newest[1]), unpack(newest)}
end
local newest = redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')[2]
if not newest or (ARGV[1] ~= '' and tonumber(newest) <= at) then -- as nearly always: nothing is newer
  local count = redis.call('ZCOUNT', key, '(' .. plain(at - window), '+inf')
  if count < tonumber(ARGV[8]) then
    return {count}
  end
end
local count, first, last, members = fullest()
if count < tonumber(ARGV[8]) then
  return {count}
end
return {count, first, last, unpack(members)}
