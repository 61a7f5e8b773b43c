-- Begins a session. All writes come after every refusal, so a full server or too many sessions leave nothing behind.
-- It also ends two sessions that are overdue, so that sessions do not pile up even where no worker ever runs.
-- KEYS  1 record  2… its names under other peppers  then the record that it replaces, if that is in this shard, under
--       each pepper
-- ARGV  1 prefix  2 user, '' for none  3 tags, one a line  4 idle µs  5 absolute µs
--       6 most sessions of this user, 0 for any number  7 1: end the oldest to make room, 0: refuse
--       8 meta  9 how many names under other peppers  10 how long ago it was asked for, µs
--       11 when the user last proved his identity, '' for now, '0' for never
--       12 the response brings a cookie: 1 nothing is begun if what this replaces is gone and the browser is getting
--       another one in its place, 2 others under the old name must not set theirs over it, 3 both; 0 it brings none
--       13 the names of the user's device, under each pepper, '' for none  14 ms it is known  15… key, JSON, key, JSON …
-- returns {'ok', now, {h, user … of those that had expired}, {h … of those that made room}, how long before the call
--         the grace of the name to replace was over, µs, or -1, 1 if the device is new to a user who has others}
--         {'full', how many sessions the user has}, {'replaced', how long before the call the grace of the name to
--         replace was over, µs, or -1}, {'again', {h, user … of those that had expired}} some of very many were looked
--         at and cleared away: go on, or {'never'} this call was undone before it came here
-- include: time session session_index

local LOOKED_AT = 300 -- sessions of the user, the oldest first: no call holds up the server for long
local DROPPED = 100 -- of those, to make room
local MOST_DEVICES = 50

local prefix, user, tags = ARGV[1], ARGV[2], ARGV[3]
local now = now_us()
local h = string.sub(KEYS[1], #prefix + 3)
local known = redis.call('HMGET', KEYS[1], '_c', '_never')
if known[2] then
  return {'never'}
end

local others = tonumber(ARGV[9])
local old = {unpack(KEYS, 2 + others)}
local cookie = tonumber(ARGV[12])
local replaced, _, dead, late, gone_by = find(prefix, now, old, now - tonumber(ARGV[10]), HOPS_TO_END)
-- Another login may take the place of the same session, and has taken it out of use (session_hold). If that login is
-- refused it gives the session back, so it is ended here like one that lives.
local held = dead and dead.limit == 0 and dead or nil
if known[1] then -- names are never chosen twice, so this call was sent again
  return {'ok', known[1], {}, {}, late and plain(late) or '-1', 0}
end
if cookie % 2 == 1 and not replaced and is_late(prefix, old) then
  return {'replaced', late and plain(late) or '-1'}
end
local most, living, stale, gone, unseen = tonumber(ARGV[6]), {}, {replaced}, {}, 0
local index = prefix .. 'u:' .. user
if most > 0 then
  local names = asked_of('ZRANGE', index, 0, LOOKED_AT - 1) or {}
  for _, other in ipairs(names) do
    local session = read_record(prefix, other)
    if not session then
      gone[#gone + 1] = other
    elseif other ~= (replaced or held or {}).h then
      local is_held = session.limit == 0 -- until it is known whether another login takes its place: see session_hold
      table.insert((is_held or lives(prefix, session, now)) and living or stale, session)
    end
  end
  unseen = (asked_of('ZCARD', index) or 0) - #names
end

local function clear_away(ended)
  if #gone > 0 then
    redis.call('ZREM', index, unpack(gone))
  end
  drop_all(prefix, stale)
  for _, session in ipairs(stale) do
    if now >= session.deadline then
      tell(ended, session)
    end
  end
end

if most > 0 and ARGV[7] == '0' and #living + unseen >= most then
  local dead = #gone + #stale - (replaced and 1 or 0)
  if unseen == 0 or dead == 0 then
    return {'full', #living + unseen}
  end
  table.remove(stale, replaced and 1 or #stale + 1) -- it goes only when there is room
  local ended = {}
  clear_away(ended)
  return {'again', ended}
end

-- A user's first device is no news. One has a name under each pepper, so processes that have only one of them know it.
local function is_new_device(names, life)
  if names == '' then
    return false
  end
  local key = prefix .. 'd:' .. user
  local known = asked_of('ZCARD', key)
  if known then -- each device for itself: the key lives on by any of them
    known = known - redis.call('ZREMRANGEBYSCORE', key, '-inf', plain(now - 1000 * tonumber(life)))
  else
    redis.call('UNLINK', key)
  end
  -- Logins from before the clock was put back are of just before now, or they would push this one out.
  for _, ahead in ipairs(asked_of('ZRANGE', key, '+inf', plain(now), 'BYSCORE', 'REV') or {}) do
    redis.call('ZADD', key, plain(now - 1), ahead)
  end
  local is_new, count = true, 0
  for device in string.gmatch(names, '%S+') do
    is_new, count = redis.call('ZADD', key, plain(now), device) == 1 and is_new, count + 1
  end
  redis.call('ZREMRANGEBYRANK', key, 0, -MOST_DEVICES * count - 1)
  redis.call('PEXPIRE', key, life)
  keep_for(prefix .. 'clock', tonumber(life)) -- whoever moves a shard finds by its clock that it has keys
  return is_new and known and known > 0
end

local bytes = 0
for i = 15, #ARGV do
  bytes = bytes + #ARGV[i]
end
local limit = now + tonumber(ARGV[5])
local session = {h = h, user = user, tags = tags, limit = limit, deadline = math.min(now + tonumber(ARGV[4]), limit)}
local life = life_of(limit, now)
session.stamp = next_stamp(prefix, now, life)
index_session(prefix, session, life)
write_aliases({unpack(KEYS, 2, 1 + others)}, session, now)
-- The record comes last. A user of Redis who lacks a right ends the script half-way, and this call, sent again, would
-- take a record without its indexes for one that is done: nobody could end that session.
redis.call('HSET', KEYS[1], '_u', user, '_c', plain(now), '_l', plain(now), '_x', plain(limit), '_i', ARGV[4],
  '_v', '1', '_t', tags, '_m', ARGV[8], '_b', bytes, '_s', session.stamp, unpack(ARGV, 15))
if ARGV[11] ~= '' then
  redis.call('HSET', KEYS[1], '_a', ARGV[11])
end
redis.call('PEXPIRE', KEYS[1], plain(life_of(session.deadline, now)))

local ended, evicted = {}, {}
note_end(prefix, gone_by)
clear_away(ended)
if held then
  drop(prefix, held)
end
for i = 1, most > 0 and math.min(#living - most + 1, DROPPED) or 0 do
  drop(prefix, living[i])
  evicted[i] = living[i].h
end
if cookie >= 2 and old[1] then
  mark_late(prefix, old[1], replaced or held)
elseif cookie == 1 and old[1] then
  mark_begun(prefix, old[1])
end
sweep(prefix, now, 2, ended)
local is_new = is_new_device(ARGV[13], ARGV[14]) and 1 or 0
return {'ok', plain(now), ended, evicted, late and plain(late) or '-1', is_new}
