-- Keeps the first snapshot of a minute, and remembers the open findings, so that one worker logs each of them: when it
-- begins, and when it becomes a failure. What the webhook is to tell of them is noted here, too: it is neither lost nor
-- doubled, whenever the worker or its connection dies.
-- KEYS  1 health  2 health:week  3 health:open  4 webhook  5 health:nodes
-- ARGV  1 snapshot, JSON  2 most in health  3 most in health:week  4 how long all keys are kept, s
--       5 most in webhook; 0: there is none  6 the worker's machine  7 what nodes of clusters have counted, '' without
--       8… of each finding: its name, its severity, and the event that it begins, JSON
-- returns {1, {findings that began, or became failures}, {finding that ended, for how long it was open, ms, …}}
--         {0, {}, {}}: this minute has a snapshot already
-- flags: allow-oom
-- include: time

local now_ms = math.floor(now_us() / 1000)
local keep = tonumber(ARGV[4])
local GONE_MS = 3600000

local function newest(stream)
  local entry = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  return entry and tonumber(string.match(entry[1], '^%d+')) or 0
end

-- Drops snapshots that were kept while the clock stood ahead. A stream takes no id below its last one, nor below one that
-- was deleted from it (Valkey, Redis 7.2), so the others are written to a new stream: else nothing would be kept until
-- the clock has caught up.
local function drop_future(stream, slot_ms)
  local past = redis.call('XRANGE', stream, '-', plain(now_ms + slot_ms - 1))
  redis.call('UNLINK', stream)
  for _, entry in ipairs(past) do
    redis.call('XADD', stream, entry[1], unpack(entry[2]))
  end
  redis.call('EXPIRE', stream, keep)
end

-- The id is the slot of time, so a second beat, or a clock that stepped back within it, adds nothing.
local function keep_in(stream, most, slot_ms)
  local slot = now_ms - now_ms % slot_ms
  if newest(stream) >= now_ms + slot_ms then
    drop_future(stream, slot_ms)
  end
  if newest(stream) >= slot then
    return false
  end
  redis.call('XADD', stream, 'MAXLEN', most, plain(slot) .. '-0', 'snapshot', ARGV[1])
  redis.call('EXPIRE', stream, keep)
  return true
end

-- Returns the machine that a finding is about: `system disk on web-1`. Workers on several machines take turns, and one
-- knows nothing of the others': what another one has found ends when that one says so, or is not heard of for an hour.
-- When it last found something of itself is under `@<machine>`. Since when a finding is a failure is under `!<name>`.
local function machine_in(name)
  return string.match(name, ' on (%S+)$')
end

local function note(event)
  if ARGV[5] ~= '0' then
    redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', 'event', event)
    redis.call('EXPIRE', KEYS[4], keep)
  end
end

if not keep_in(KEYS[1], ARGV[2], 60000) then
  return {0, {}, {}}
end
keep_in(KEYS[2], ARGV[3], 300000)
if ARGV[7] ~= '' then
  redis.call('SET', KEYS[5], ARGV[7], 'EX', keep)
end

local began, ended, found, is_about_us = {}, {}, {}, false
for n = 8, #ARGV, 3 do
  local name, severity = ARGV[n], ARGV[n + 1]
  found[name] = true
  is_about_us = is_about_us or machine_in(name) == ARGV[6]
  local is_new = redis.call('HSETNX', KEYS[3], name, plain(now_ms)) == 1
  local fails = severity == 'fail' and redis.call('HSETNX', KEYS[3], '!' .. name, plain(now_ms)) == 1
  if severity ~= 'fail' then
    redis.call('HDEL', KEYS[3], '!' .. name)
  end
  if is_new or fails then
    began[#began + 1] = name
    note(ARGV[n + 2])
  end
end
if is_about_us then
  redis.call('HSET', KEYS[3], '@' .. ARGV[6], plain(now_ms))
end

local open = redis.call('HGETALL', KEYS[3])
local times = {}
for n = 1, #open, 2 do
  times[open[n]] = tonumber(open[n + 1]) or now_ms
  if times[open[n]] > now_ms then -- from before the clock stepped back
    times[open[n]] = now_ms
    redis.call('HSET', KEYS[3], open[n], plain(now_ms))
  end
end
-- Returns whether nobody but that machine can tell, and it is still there to do so.
local function is_unknown(machine)
  local seen = machine and machine ~= ARGV[6] and times['@' .. machine]
  return seen and now_ms - seen < GONE_MS
end
for name, since in pairs(times) do
  local machine = string.match(name, '^@(.*)$')
  if machine then
    if not is_unknown(machine) and not (is_about_us and machine == ARGV[6]) then
      redis.call('HDEL', KEYS[3], name)
    end
  elseif string.sub(name, 1, 1) ~= '!' and not found[name] and not is_unknown(machine_in(name)) then
    redis.call('HDEL', KEYS[3], name, '!' .. name)
    ended[#ended + 1] = name
    ended[#ended + 1] = plain(now_ms - since)
    note(cjson.encode({kind = 'finding over', name = name, lasted_s = (now_ms - since) / 1000}))
  end
end
redis.call('EXPIRE', KEYS[3], keep)
return {1, began, ended}
