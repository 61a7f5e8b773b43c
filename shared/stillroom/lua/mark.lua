-- Invalidates: moves the clock on and leaves a mark for each member.
-- KEYS  1 clock  2 marks
-- ARGV  1 epoch to begin if the clock or the marks are lost  2… members: t:<tag> hard, s:<tag> soft
-- returns the new clock, `<epoch>.<seq>`
-- include: clock

local epoch, seq = next_moment(KEYS[1], KEYS[2], ARGV[1])
for i = 2, #ARGV do
  redis.call('ZADD', KEYS[2], plain(seq), ARGV[i])
end
return write_clock(KEYS[1], KEYS[2], epoch, seq)
