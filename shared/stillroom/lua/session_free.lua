-- Gives a session back that was taken out of use (session_hold). A session that was ended meanwhile stays ended.
-- KEYS  1 record
-- ARGV  1 prefix
-- returns 1 it lives, 0 it was gone
-- include: time session session_index

local now = now_us()
local limit = redis.call('HGET', KEYS[1], '_held')
if not limit then
  return 0
end
redis.call('HDEL', KEYS[1], '_held') -- the first write takes no memory: see session_sweep
redis.call('HSET', KEYS[1], '_x', limit)
redis.call('UNLINK', late_key(ARGV[1], KEYS[1]))
local session = read(ARGV[1], string.sub(KEYS[1], #ARGV[1] + 3))
redis.call('PEXPIRE', KEYS[1], plain(life_of(session.deadline, now)))
redis.call('ZADD', ARGV[1] .. 'x', plain(session.deadline), member_of(session.h, session.user, session.tags))
return 1
