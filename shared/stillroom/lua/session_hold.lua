-- Takes a session out of use until it is known whether another may begin in its place: it reads as expired, and is
-- deleted a minute later unless session_free comes before.
-- KEYS  1… record, under each pepper
-- ARGV  1 prefix  2 how long ago it was asked for, µs: a name that was rotated since still counts
--       3 2: the response brings the browser another cookie, 0: none
-- returns {h}, {''} there was none that lived, or {'', how long before it was asked for the grace of this name was over, µs}
-- include: time session session_index

local HELD_US = 60000000
local now = now_us()
local session, _, dead, late, old = find(ARGV[1], now, KEYS, now - tonumber(ARGV[2]), HOPS_TO_END)
if dead and redis.call('HEXISTS', dead.key, '_held') == 1 then
  return {dead.h} -- this call was sent again
end
if not session then
  note_end(ARGV[1], old)
  return {'', late and plain(late)}
end
-- A user of Redis who lacks a right is refused before the session is held: a login that fails knows of no hold to end.
redis.call('PEXPIRE', session.key, plain(life_of(session.deadline, now))) -- takes no memory: see session_sweep
redis.call('ZADD', ARGV[1] .. 'x', plain(now + HELD_US), member_of(session.h, session.user, session.tags))
keep_for(ARGV[1] .. 'x', life_of(session.limit, now))
redis.call('HSET', session.key, '_held', plain(session.limit), '_x', '0')
redis.call('PEXPIRE', session.key, plain(life_of(now + HELD_US, now)))
if ARGV[3] == '2' then -- others that read it meanwhile must not take the cookie away, nor begin a session in its place
  mark_late(ARGV[1], KEYS[1], session)
end
return {session.h}
