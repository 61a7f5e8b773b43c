-- A key of another type was written by somebody else, and gives way: it must not stop those who read for all.
local function own(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= 'none' and found ~= kind then
    redis.call('UNLINK', key)
  end
end
