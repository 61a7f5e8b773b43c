-- Tells the time by the server's clock: an app's own clock never decides anything.

local function now_us()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

local function plain(number)
  return string.format('%.0f', number) -- tostring() would round 1.7e15
end
