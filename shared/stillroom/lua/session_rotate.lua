-- Gives a session a new name. The old one leads to it for a moment, for the requests that are under way; after
-- that its use is a replay.
-- KEYS  1… record, under each pepper; the last: the new name's
-- ARGV  1 prefix  2 grace µs  3 1: the user has just proved who he is
-- returns {'ok', h, what the record says of itself, its data}, {'conflict'} somebody else has rotated it, or why not: see session_get
-- include: clock session

local prefix, now = ARGV[1], now_us()
local fresh = table.remove(KEYS)
local h = string.sub(fresh, #prefix + 3)
if redis.call('EXISTS', fresh) == 1 then
  return answer(h, fresh) -- names are never chosen twice: it is this call, sent again
end
local session, refusal = find(prefix, now, KEYS)
if not session then
  return refusal
end
local is_named = false
for _, key in ipairs(KEYS) do
  is_named = is_named or key == session.key
end
if not is_named then
  return {'conflict'}
end

redis.call('RENAME', session.key, fresh)
local old = member_of(session.h, session.user, session.tags)
redis.call('ZADD', prefix .. 'x', plain(session.deadline), member_of(h, session.user, session.tags))
redis.call('ZREM', prefix .. 'x', old) -- second: a set that is empty for a moment loses its TTL
for _, index in ipairs(indexes_of(session)) do
  redis.call('ZADD', prefix .. index, plain(session.stamp), h)
  redis.call('ZREM', prefix .. index, session.h)
end

local grace = tonumber(ARGV[2])
redis.call('HSET', session.key, '_to', h, '_until', plain(now + grace), '_u', session.user)
local watched = math.max(grace, math.min(session.idle, session.limit - now))
redis.call('PEXPIRE', session.key, plain(math.ceil(watched / 1000)))
session.key = fresh
see(session, now)
if ARGV[3] == '1' then
  redis.call('HSET', fresh, '_a', plain(now))
end
mark_late(prefix, KEYS[1])
return answer(h, fresh)
