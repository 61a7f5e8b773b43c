-- Lets a ban hold in one shard of the limits, where checks look for it. Where it was decided is in another slot. May be
-- sent again, and late: what was lifted since does not come back.
-- KEYS  1 ban  2 widths of bans: see lib/ban.lua  3 lifted: a number of the last lift of this subject
-- ARGV  1 the ban, JSON  2 for how long, ms  3 its width, where bans of it are not looked for anyway: '4/24' …
--       4 what `lifted` was before the ban was read, '' for nothing. No clock can tell: it may step.
-- returns 1 it holds, 0 it was lifted
-- flags: allow-oom
-- include: time ban

if (redis.call('GET', KEYS[3]) or '') ~= ARGV[4] then
  return 0
end
if ARGV[3] ~= '' then
  -- How many widths there may be was decided where the ban was. Here are also those of bans that were lifted.
  note_width(KEYS[2], ARGV[3], math.floor(now_us() / 1000), tonumber(ARGV[2]), math.huge)
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
