-- Counts events, each for one rule and one group. A count holds members with the time they were last seen, so an event
-- that is read twice counts once, and a user who is tried twice counts once.
-- Events may be read late and in any order: a worker dies, and another reads its events. So the count of an event is the
-- fullest window that holds it, and not all events since.
-- The number of counts is bounded, too: a million addresses, one event each, push out the counts that grew longest ago.
-- One call counts many events, because in an attack most of a script's time is its start.
-- KEYS  1 groups  2 … of each event the count of its group
-- ARGV  1 most groups  2 how many rules follow
--       of each rule: window, ms; how long a count is kept, ms; most members; 1 if members are numbers of windows, and the
--         count is how many in a row; threshold; one window of such a row, ms
--       of each event: which of these rules; member, or '' only to look; when by its id, ms
-- returns for each event {count}; from the threshold on {count, first ms, last ms, up to five of the newest members …}
-- flags: allow-oom
-- include: time own

local GROUP_MS = 86400000 -- no count is kept longer; a longer one is only dropped too soon
local MISSED = 2 -- windows in a row may be this far apart: an event late in one and early in the next but one
local SHOWN = 5
local RULE_WORDS, EVENT_WORDS = 6, 3
local groups, most_groups = KEYS[1], tonumber(ARGV[1])
local now = math.floor(now_us() / 1000)
local grown = {} -- score, key, score, key …

local function read_rules()
  local rules = {}
  for i = 1, tonumber(ARGV[2]) do
    local at = 2 + (i - 1) * RULE_WORDS
    rules[i] = {
      window = tonumber(ARGV[at + 1]),
      kept = tonumber(ARGV[at + 2]),
      most = tonumber(ARGV[at + 3]),
      is_a_row = ARGV[at + 4] == '1',
      threshold = tonumber(ARGV[at + 5]),
      step = tonumber(ARGV[at + 6]),
    }
  end
  return rules
end

-- An event whose time is uncertain keeps the time it had when it was read first.
local function add(key, rule, member, at, is_timely)
  redis.call('ZADD', key, is_timely and 'GT' or 'NX', plain(at), member)
  redis.call('ZREMRANGEBYRANK', key, 0, -rule.most - 1)
  redis.call('PEXPIRE', key, plain(rule.kept))
  grown[#grown + 1] = plain(now)
  grown[#grown + 1] = key
end

local function in_a_row(key, at, window)
  local windows = redis.call('ZRANGE', key, '+inf', '(' .. plain(at - window), 'BYSCORE', 'REV')
  for i = 2, #windows do
    if tonumber(windows[i - 1]) - tonumber(windows[i]) > MISSED then
      return i - 1
    end
  end
  return #windows
end

local function row(key, rule, at)
  local count = in_a_row(key, at, rule.window)
  if count < rule.threshold then
    return {count}
  end
  local newest = redis.call('ZREVRANGE', key, 0, math.min(count, SHOWN) - 1)
  local oldest = redis.call('ZREVRANGE', key, count - 1, count - 1, 'WITHSCORES')[2]
  return {count, oldest, redis.call('ZSCORE', key, newest[1]), unpack(newest)}
end

-- Returns how many members the fullest window between these times has, its first and last ms, and its newest members.
local function fullest(key, window, after, newest)
  local found = redis.call('ZRANGEBYSCORE', key, after, newest, 'WITHSCORES')
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

local function count_one(key, rule, member, id_ms)
  -- A stream's ids never go back. Where the clock has, they stand still until it has caught up, so the event is of now.
  local at = math.min(id_ms, now)
  local is_added = member ~= ''
  own(key, 'zset')
  redis.call('ZREMRANGEBYSCORE', key, '-inf', plain(at - rule.kept))
  local newest = tonumber(redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')[2])
  if newest and newest > now then -- from before the clock stepped back
    redis.call('ZREMRANGEBYSCORE', key, '(' .. plain(now), '+inf')
    newest = tonumber(redis.call('ZREVRANGE', key, 0, 0, 'WITHSCORES')[2])
  end
  if is_added then
    add(key, rule, rule.is_a_row and plain(math.floor(at / rule.step)) or member, at, at == id_ms)
  end
  if rule.is_a_row then
    return row(key, rule, at)
  end
  local after = '(' .. plain(at - rule.window)
  if is_added and (not newest or newest <= at) then -- as nearly always: nothing is newer
    local count = redis.call('ZCOUNT', key, after, '+inf')
    if count < rule.threshold then
      return {count}
    end
  end
  -- Where a count is only looked at, it ends with this event: later members do not count.
  local last_ms = is_added and '(' .. plain(at + rule.window) or plain(at)
  local count, first, last, members = fullest(key, rule.window, after, last_ms)
  if count < rule.threshold then
    return {count}
  end
  return {count, first, last, unpack(members)}
end

local function make_room()
  redis.call('ZREMRANGEBYSCORE', groups, '-inf', plain(now - GROUP_MS))
  redis.call('ZREMRANGEBYSCORE', groups, '(' .. plain(now), '+inf')
  redis.call('PEXPIRE', groups, plain(GROUP_MS))
  local over = redis.call('ZCARD', groups) - most_groups
  if over > 0 then
    local oldest = redis.call('ZPOPMIN', groups, over)
    for i = 1, #oldest, 2 do
      redis.call('UNLINK', oldest[i])
    end
  end
end

own(groups, 'zset')
local rules, counts = read_rules(), {}
local first = 2 + #rules * RULE_WORDS
for i = 2, #KEYS do
  local at = first + (i - 2) * EVENT_WORDS
  counts[i - 1] = count_one(KEYS[i], rules[tonumber(ARGV[at + 1])], ARGV[at + 2], tonumber(ARGV[at + 3]))
end
if #grown > 0 and redis.call('ZADD', groups, unpack(grown)) > 0 then
  make_room()
end
return counts
