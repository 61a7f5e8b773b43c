-- Bans a subject by order of a person.
-- KEYS  1 ban  2 bans  3 widths of bans: see lib/ban.lua
-- ARGV  1 subject  2 for how long, ms  3 reason
--       4 its width ('4/24' …) where processes do not look for bans of this width anyway
--       5 how many widths there may be
-- returns {since, until} in ms; {} where there are too many widths
-- flags: allow-oom
-- include: time ban

local now = math.floor(now_us() / 1000)
local ms = tonumber(ARGV[2])
if ARGV[4] ~= '' and not note_width(KEYS[3], ARGV[4], now, ms, tonumber(ARGV[5])) then
  return {}
end
write_ban(KEYS[1], KEYS[2], ARGV[1], now, ms, {rule = '', level = 0, by = 'operator', reason = ARGV[3]})
return {plain(now), plain(now + ms)}
