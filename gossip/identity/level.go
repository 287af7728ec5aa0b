package identity

import (
	"errors"
	"fmt"
)

// The protocol that this build speaks to other nodes: everything in gossip tags, Raft commands and node-to-node calls.
const (
	// ProtocolLevel is the newest level that this build can speak. Raise it when a peer of the level before could
	// misunderstand what this build may send.
	//
	//	2  an entry of the Raft log may hold several commands
	ProtocolLevel = 2
	// BatchLevel is the level from which on a node understands such entries.
	BatchLevel = 2
	// MinProtocolLevel is the oldest level of a peer that this build can still work with.
	MinProtocolLevel = 1
)

// ErrIncompatible is wrapped by every refusal for protocol levels.
var ErrIncompatible = errors.New("incompatible version")

// Levels is what one node can speak: every level from Min to Level.
type Levels struct {
	Level int `json:"level"` // newest level spoken
	Min   int `json:"min"`   // oldest level of a peer still understood
}

// OwnLevels are the levels of this build.
func OwnLevels() Levels { return Levels{Level: ProtocolLevel, Min: MinProtocolLevel} }

// Valid tells whether the levels can be a real node's.
func (l Levels) Valid() bool { return l.Min >= 1 && l.Level >= l.Min }

// String writes the levels as they are shown to people.
func (l Levels) String() string {
	return fmt.Sprintf("level %d (works with %d and newer)", l.Level, l.Min)
}

// Compatible tells whether a node that speaks mine and one that speaks theirs can be in one cluster: each must speak a level
// that the other still understands. The error wraps [ErrIncompatible] and says which side to upgrade.
func Compatible(mine, theirs Levels) error {
	switch {
	case !theirs.Valid():
		return fmt.Errorf("%w: the other side announces no valid protocol level (level %d, min %d): it is no Skein node of a released version",
			ErrIncompatible, theirs.Level, theirs.Min)
	case theirs.Level < mine.Min:
		return fmt.Errorf("%w: the other side speaks protocol %s, this side %s: upgrade the other side's skein",
			ErrIncompatible, theirs, mine)
	case mine.Level < theirs.Min:
		return fmt.Errorf("%w: this side speaks protocol %s, the other side %s: upgrade this side's skein",
			ErrIncompatible, mine, theirs)
	}
	return nil
}
