-- Begins a session. What writes comes after what may refuse: a full server, or a full house, leaves nothing behind.
-- Also ends two that are overdue, so that sessions do not pile up even where no worker ever runs.
-- KEYS  1 record  2… record that it replaces, if that is in this shard, under each pepper
-- ARGV  1 prefix  2 user, '' for none  3 tags, one a line  4 idle µs  5 absolute µs
--       6 most sessions of this user, 0 for any number  7 1: end the oldest to make room, 0: refuse
--       8 meta  9 when the user last proved who he is, '' for now, '0' for never
--       10 1: not if the browser is getting another cookie in the place of what it replaces
--       11 what the user's device is called, '' for none  12 ms it is known  13… key, JSON, key, JSON …
-- returns {'ok', now, {h, user … of those that had expired}, {h … of those that made room}, 1 if the device is new}
--         {'full', how many sessions the user has}, {'replaced'}
-- include: clock session

local MOST_DEVICES = 50
local prefix, user, tags = ARGV[1], ARGV[2], ARGV[3]
local now = now_us()
local h = string.sub(KEYS[1], #prefix + 3)
local known = redis.call('HGET', KEYS[1], '_c')
if known then
  return {'ok', known, {}, {}, 0} -- names are never chosen twice: it is this call, sent again
end

local old = {unpack(KEYS, 2)}
if ARGV[10] == '1' and is_late(prefix, old) then
  return {'replaced'}
end
local replaced = find(prefix, now, old)
local most, living, stale = tonumber(ARGV[6]), {}, {replaced}
if most > 0 then
  for _, other in ipairs(redis.call('ZRANGE', prefix .. 'u:' .. user, 0, -1)) do
    local session = read(prefix, other)
    if session and not (replaced and replaced.h == other) then
      table.insert(lives(prefix, session, now) and living or stale, session)
    end
  end
  if #living >= most and ARGV[7] == '0' then
    return {'full', #living}
  end
end

-- A user's first device is no news.
local function is_new_device(device, life)
  if device == '' then
    return false
  end
  local key = prefix .. 'd:' .. user
  local had_any = redis.call('EXISTS', key) == 1
  local is_new = redis.call('ZADD', key, plain(now), device) == 1
  redis.call('ZREMRANGEBYRANK', key, 0, -MOST_DEVICES - 1)
  redis.call('PEXPIRE', key, life)
  return had_any and is_new
end

local bytes = 0
for i = 13, #ARGV do
  bytes = bytes + #ARGV[i]
end
local limit = now + tonumber(ARGV[5])
local deadline = math.min(now + tonumber(ARGV[4]), limit)
redis.call('HSET', KEYS[1], '_u', user, '_c', plain(now), '_l', plain(now), '_x', plain(limit), '_i', ARGV[4],
  '_v', '1', '_t', tags, '_m', ARGV[8], '_b', bytes, unpack(ARGV, 13))
if ARGV[9] ~= '' then
  redis.call('HSET', KEYS[1], '_a', ARGV[9])
end
redis.call('PEXPIRE', KEYS[1], plain(math.ceil((deadline - now) / 1000) + SLACK_MS))
local life = math.ceil(tonumber(ARGV[5]) / 1000) + SLACK_MS
local stamp = next_stamp(prefix, now, life)
redis.call('HSET', KEYS[1], '_s', stamp)

redis.call('ZADD', prefix .. 'x', plain(deadline), member_of(h, user, tags))
keep_for(prefix .. 'x', life)
for _, index in ipairs(indexes_of({user = user, tags = tags})) do
  redis.call('ZADD', prefix .. index, stamp, h)
  keep_for(prefix .. index, life)
end

local ended = {}
for _, session in ipairs(stale) do
  drop(prefix, session)
  if now >= session.deadline then
    tell(ended, session)
  end
end
local evicted = {}
for i = 1, most > 0 and #living - most + 1 or 0 do
  drop(prefix, living[i])
  evicted[i] = living[i].h
end
if user ~= '' and old[1] then
  mark_late(prefix, old[1], replaced)
end
sweep(prefix, now, 2, ended)
return {'ok', plain(now), ended, evicted, is_new_device(ARGV[11], ARGV[12]) and 1 or 0}
