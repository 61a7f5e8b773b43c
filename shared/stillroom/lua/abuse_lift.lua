-- Lifts a ban and deletes the counts that led to it. Earlier events may still wait to be read: they, and the events of
-- the next minutes, do not ban the subject again (`lifted`).
-- KEYS  1 ban  2 level  3 lifted  4 bans  5 widths of bans: see lib/ban.lua  6… the subject's counts
-- ARGV  1 subject  2 how long `lifted` is kept, ms
--       3 its width ('4/24' …) where processes do not look for bans of this width anyway
-- returns 1 if it was banned
-- flags: allow-oom
-- include: time ban

local now = math.floor(now_us() / 1000)
local was_banned = redis.call('DEL', KEYS[1])
redis.call('DEL', KEYS[2], unpack(KEYS, 6))
redis.call('ZREM', KEYS[4], ARGV[1])
if ARGV[3] ~= '' then
  forget_width(KEYS[5], KEYS[4], ARGV[3], now)
end
redis.call('SET', KEYS[3], plain(now), 'PX', ARGV[2])
return was_banned
