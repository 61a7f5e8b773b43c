-- Invalidates: moves the clock on, leaves a mark for each member, and writes down the work that follows. It drops as
-- many marks that are too old to matter: without a beat that trims them they must not grow for ever.
-- Every read has to try the globs, so there is a limit to them: at the limit a new epoch begins instead, in which
-- nothing older lives, named or not. A new epoch begins, too, where globs were lost: `?` says how new the newest must be.
-- KEYS  1 clock  2 marks  3 globs  4 todo
-- ARGV  1 epoch to begin if the clock, the marks or globs are lost, or the globs are too many
--       2 the longest life of an entry and of the load before it, ms: for so long a mark matters, and the work is kept
--       3… members: t:<tag> hard, s:<tag> soft, p:<glob>
-- returns the clock before this, '' if there was none, and the new one, `<epoch>.<seq>`
-- flags: allow-oom
-- include: clock todo marks

local GLOBS_LIMIT = 1000
local epoch, seq, is_new, before = next_moment(KEYS[1], KEYS[2], ARGV[1])
local patterns, work = {}, {}
for i = 3, #ARGV do
  redis.call('ZADD', KEYS[2], plain(seq), ARGV[i])
  if string.sub(ARGV[i], 1, 2) == 'p:' then
    patterns[#patterns + 1] = string.sub(ARGV[i], 3)
    work[#work + 1] = 'sweep'
  else
    work[#work + 1] = ARGV[i]
  end
end
if #patterns > 0 then
  local newest = redis.call('ZREVRANGE', KEYS[3], 0, 0, 'WITHSCORES')[2] or '0'
  local lost = tonumber(newest) ~= tonumber(redis.call('ZSCORE', KEYS[2], '?') or '0')
  for _, glob in ipairs(patterns) do
    redis.call('ZADD', KEYS[3], plain(seq), glob)
  end
  redis.call('ZADD', KEYS[2], plain(seq), '?')
  if lost or redis.call('ZCARD', KEYS[3]) > GLOBS_LIMIT then
    redis.call('UNLINK', KEYS[2], KEYS[3])
    epoch, is_new = begin_epoch(KEYS[2], ARGV[1], seq), true
  end
end
if is_new then
  work[#work + 1] = 'sweep'
else
  drop_old_marks(epoch, seq, KEYS[2], KEYS[3], tonumber(ARGV[2]) * 1000, #ARGV)
end
promise(KEYS[4], work, ARGV[2])
return {before, write_clock(KEYS[1], KEYS[2], epoch, seq)}
