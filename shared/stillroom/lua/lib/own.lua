-- Deletes a key of another type, which a foreign writer left: it must not stop the worker.
local function own(key, kind)
  local found = redis.call('TYPE', key).ok
  if found ~= 'none' and found ~= kind then
    redis.call('UNLINK', key)
  end
end
