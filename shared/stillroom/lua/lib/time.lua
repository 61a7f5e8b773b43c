-- Tells the time by the server's clock: an app's own clock never decides anything.

local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function plain(number)
  return string.format('%.0f', number) -- tostring() would round 1.7e15
end

-- Returns whether the caller has given up on this command. `in_time` is `<from>-<to>` in µs of this clock. A time
-- before `from` means that the clock was put back while the command was on its way.
local function is_late(in_time)
  local from, upto = string.match(in_time, '^(%d+)%-(%d+)$')
  local now = now_us()
  return now < tonumber(from) or now > tonumber(upto)
end
