-- Lifts a ban and deletes the counts that led to it. Earlier events may still wait to be read: they, and the events of
-- the next minutes, do not ban the subject again (`lifted`).
-- KEYS  1 ban  2 level  3 lifted  4 bans  5… the subject's counts
-- ARGV  1 subject  2 how long `lifted` is kept, ms
-- returns 1 if it was banned
-- flags: allow-oom
-- include: time

local was_banned = redis.call('DEL', KEYS[1])
redis.call('DEL', KEYS[2], unpack(KEYS, 5))
redis.call('ZREM', KEYS[4], ARGV[1])
redis.call('SET', KEYS[3], plain(math.floor(now_us() / 1000)), 'PX', ARGV[2])
return was_banned
