-- The first part of MARK where the slot is moving and each name has to be dealt with alone: registers marks under the server's own time, so that no writer's clock decides when a mark counts as forgotten.
-- KEYS: registry. ARGV: members.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
for _, member in ipairs(ARGV) do redis.call('ZADD', KEYS[1], 'NX', now_ms, member) end
return #ARGV
