-- Tells whether a command comes too late.
-- include: time

-- Returns whether the caller has given up on this command. `in_time` is `<from>-<to>` in µs of this clock. A time
-- before `from` means that the clock was put back while the command was on its way.
local function is_late(in_time)
  local from, upto = string.match(in_time, '^(%d+)%-(%d+)$')
  local now = now_us()
  return now < tonumber(from) or now > tonumber(upto)
end
