package space

import (
	"maps"
	"slices"
)

// Hash of a shard's revisions after one compaction, as a replica computed it.
// Replicas that were compacted at the same revision, and before at the same,
// have the same hash; others cannot be compared.
type Hash struct {
	Revision, Compacted int64
	Hash                uint32
}

// Corrupt compares what replicas, by ID, know of their hashes, and returns those
// whose data differs from that of most others. Of two replicas that differ, with
// nobody to decide, it is the one that is not the leader: its data is what
// clients have seen. With three it may be the leader.
func Corrupt(leader uint64, hashes map[uint64][]Hash) (replicas []uint64) {
	type key struct{ revision, compacted int64 }
	byKey := map[key]map[uint32][]uint64{}
	for _, id := range slices.Sorted(maps.Keys(hashes)) {
		for _, h := range hashes[id] {
			k := key{h.Revision, h.Compacted}
			if byKey[k] == nil {
				byKey[k] = map[uint32][]uint64{}
			}
			if !slices.Contains(byKey[k][h.Hash], id) {
				byKey[k][h.Hash] = append(byKey[k][h.Hash], id)
			}
		}
	}
	found := map[uint64]bool{}
	for _, groups := range byKey {
		if len(groups) < 2 {
			continue
		}
		right := majority(leader, groups)
		for hash, ids := range groups {
			for _, id := range ids {
				if hash != right {
					found[id] = true
				}
			}
		}
	}
	return slices.Sorted(maps.Keys(found))
}

// majority returns the hash of the most replicas, of equally many the leader's,
// else the smallest.
func majority(leader uint64, groups map[uint32][]uint64) (right uint32) {
	best := -1
	for _, hash := range slices.Sorted(maps.Keys(groups)) {
		weight := 2 * len(groups[hash])
		if slices.Contains(groups[hash], leader) {
			weight++
		}
		if weight > best {
			right, best = hash, weight
		}
	}
	return right
}
