-- Lets a ban hold in one shard of the limits, where checks look for it. Where it was decided is in another slot. May be
-- sent again, and late: what was lifted since does not come back.
-- KEYS  1 ban  2 widths of bans: see lib/ban.lua  3 lifted: when bans of this subject were, by the clock of `since`
-- ARGV  1 the ban, JSON  2 for how long, ms  3 its width, where bans of it are not looked for anyway: '4/24' …
--       4 how many such widths there may be
-- returns 1 it holds, 0 it was lifted
-- flags: allow-oom
-- include: time ban

local since = tonumber(string.match(ARGV[1], '"since":([%d.]+)') or '0') * 1000
local lifted = tonumber(redis.call('GET', KEYS[3]) or '')
if lifted and since < lifted then
  return 0
end
if ARGV[3] ~= '' then
  note_width(KEYS[2], ARGV[3], math.floor(now_us() / 1000), tonumber(ARGV[2]), tonumber(ARGV[4]))
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
