-- Gives a session a new name. The old one leads to it for a moment, for the requests that are under way; after
-- that, and for as long as the session may live, its use is a replay.
-- KEYS  1… record, under each pepper; then the new name, under each pepper
-- ARGV  1 prefix  2 grace µs  3 how many names the new one has  4 1: the user has just proved his identity
--       5 1: the response brings the browser the new name
-- returns {'ok', h, the record's own fields, its data, µs since it was written down that it was seen}, {'conflict'}
--         another call has rotated it, or the reason: see session_get
-- include: time session session_index

local prefix, now = ARGV[1], now_us()
local names = #KEYS - tonumber(ARGV[3])
local fresh = KEYS[names + 1]
local h = string.sub(fresh, #prefix + 3)
local known = redis.call('HMGET', fresh, '_c', '_never')
if known[1] then
  return answer(h, fresh) -- names are never chosen twice, so this call was sent again
end
if known[2] then
  return {'conflict'} -- this call was undone before it came here
end
local session, refusal = find(prefix, now, {unpack(KEYS, 1, names)})
if not session then
  return refusal
end

-- The name under this pepper or, while today's name is under another pepper, under that.
local function is_named(key)
  local alias = key ~= session.key and redis.call('HMGET', key, '_alias', '_to')
  return not alias or (alias[1] and alias[2] == session.h)
end

local is_current = false
for i = 1, names do
  is_current = is_current or is_named(KEYS[i])
end
if not is_current then
  return {'conflict'}
end

local former, old = session.h, session.key
local grace = tonumber(ARGV[2])
redis.call('RENAME', old, fresh)

local function lead_to_the_new_name()
  session.h, session.key = h, fresh
  see(session, now)
  local life = life_of(session.limit, now)
  index_session(prefix, session, life, former)
  redis.call('HSET', old, '_to', h, '_until', plain(now + grace), '_grace', ARGV[2], '_u', session.user)
  redis.call('PEXPIRE', old, plain(math.max(math.ceil(grace / 1000), life)))
  write_aliases({unpack(KEYS, names + 2)}, session, now)
end

-- A user of Redis who lacks a right ends this half-way. Its browser has the old name, and must not lose its session.
local is_done, failure = pcall(lead_to_the_new_name)
if not is_done then
  redis.call('RENAME', fresh, old)
  error(failure)
end
if ARGV[4] == '1' then
  redis.call('HSET', fresh, '_a', plain(now))
end
if ARGV[5] == '1' then
  mark_late(prefix, old)
end
local found = answer(h, fresh)
found[5] = now - session.seen -- less than 0 where the clock has stepped back since
return found
