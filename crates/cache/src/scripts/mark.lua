-- MARK: a transaction is about to commit changes of some keys.
-- KEYS: registry, then of each key: marks, guard, value, stale copy.
-- ARGV: mark, longest time of a stale copy in ms, then of each key: its member of the registry.
--
-- In one step: of a mark that was taken back while a part of it was still on its way, that part must not remain where
-- nobody looks for it. The server's own time, so that no writer's clock decides when a mark counts as forgotten.

local time = redis.call('TIME')
local now_ms = time[1] * 1000 + math.floor(time[2] / 1000)
for nth = 3, #ARGV do
    local at = (nth - 3) * 4 + 2
    redis.call('ZADD', KEYS[1], 'NX', now_ms, ARGV[nth])
    redis.call('SADD', KEYS[at], ARGV[1])
    redis.call('UNLINK', KEYS[at + 1], KEYS[at + 2])
    local stale = KEYS[at + 3]
    if redis.call('PTTL', stale) > tonumber(ARGV[2]) then redis.call('PEXPIRE', stale, ARGV[2]) end
end
return #ARGV - 2
