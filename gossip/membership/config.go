// Package membership is the cluster as this node sees it: who is there, where, with which tags, and whether they answer. It
// wraps serf, which no other package imports.
//
// Contract: membership is liveness and hints, never truth: two nodes may see different things, and nothing may be decided
// for the whole cluster from one node's view. [Membership.Members] is a snapshot; [Membership.Subscribe] tells that a newer one
// may differ, coalesced, never what changed. A change is in the snapshot before a subscriber is told of it, and changes of one
// member appear in the order in which this node learned of them, though intermediate ones may never be seen. Member.Since is this
// process's own monotonic time; no clock of another node is ever compared. Only the daemon starts a Membership; all methods may be
// called from any goroutine, but no callback may call back into it.
//
// Suspicion. memberlist tells nobody that it suspects a node: its event delegate has join, leave and update only, and what
// others suspect stays inside. What can be had is this node's own evidence: memberlist asks [memberlist.Config]'s
// DisableTcpPingsForNode just when a direct probe of a node went unanswered. Such a node is probed again at once and, if that
// fails too, is [health.Suspect] until it answers this node's probe or is declared dead. In a cluster of n nodes each one is
// probed by this node only every n-1 probe intervals, so in large clusters a death is often announced by others first and
// comes without a suspicion. A node that answers others but not this one stays suspect, as it should.
package membership

import (
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	"skein.io/skein/gossip/identity"
)

// DefaultPort is the gossip port, TCP and UDP.
const DefaultPort = 7946

// Keys of tags that every node carries. serf keeps all tags of a node in 512 bytes, so they are short.
const (
	TagID       = "id"    // the node's host id in consensus; stays through restarts and changes of address
	TagIP       = "ip"    // the node's address for everything but gossip
	TagAPI      = "api"   // port of the API endpoint
	TagRaft     = "raft"  // port of consensus
	TagAgent    = "agent" // port of the agent
	TagZone     = "z"
	TagRole     = "r"   // leader, voter, spare or none: what the node holds now
	TagVersion  = "v"   // of the binary, for people
	TagReady    = "rdy" // "1" while the node serves the API from a replica of its own, "0" while that has lost the store's leader
	tagLevel    = "pl"  // protocol level; set by this package
	tagMinLevel = "pm"
)

// Config is what a Membership needs to start.
type Config struct {
	// Name is the node's name; see identity.ValidateName.
	Name string
	// Addr is the node's own address: gossip is bound to it and it is what the others are told.
	Addr netip.Addr
	// Port for TCP and UDP; default [DefaultPort].
	Port uint16
	// Key encrypts and authenticates gossip; identity.GossipKeySize bytes. Nodes with another key cannot talk to this one.
	Key []byte
	// Tags to begin with; see [Membership.SetTags].
	Tags map[string]string
	// Levels that this node speaks; default identity.OwnLevels. Members of incompatible levels are refused.
	Levels identity.Levels
	// Profile of timing, [LAN] (default) or [Edge]; all nodes of a cluster should have the same.
	Profile Profile
	// Dir is a directory for what must outlive a restart: the addresses of members to find back to, and serf's clock. It is
	// made (0700) if its parent exists. Empty: nothing is kept.
	Dir string
	// Seeds are gossip addresses that are tried, over and over, while no other member is alive from here.
	Seeds []netip.AddrPort
	// OnConflict is called when two nodes claim one name, at most once a minute for each pair of addresses; may be nil. If it
	// is this node that has to yield, Done is closed as well.
	OnConflict func(Conflict)
	// Logger; nil discards.
	Logger *slog.Logger

	// unreachable cuts this node off from addresses, for tests.
	unreachable func(addr netip.AddrPort) bool
	// retime changes the profile's timing, for tests.
	retime func(*timing)
}

func (c *Config) timing() timing {
	t := profiles[c.Profile]
	if c.retime != nil {
		c.retime(&t)
	}
	return t
}

func (c *Config) setDefaults() {
	if c.Port == 0 {
		c.Port = DefaultPort
	}
	if c.Levels == (identity.Levels{}) {
		c.Levels = identity.OwnLevels()
	}
	if c.Profile == "" {
		c.Profile = LAN
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Addr = c.Addr.Unmap()
	c.Seeds = slices.Clone(c.Seeds)
	c.Tags = maps.Clone(c.Tags)
}

// Validate reports all faults at once. Defaults must have been set, as [Start] does.
func (c *Config) Validate() error {
	var errs []error
	if err := identity.ValidateName(c.Name); err != nil {
		errs = append(errs, err)
	}
	if !c.Addr.IsValid() || c.Addr.IsUnspecified() || c.Addr.IsMulticast() {
		errs = append(errs, fmt.Errorf("address %q is not one that other nodes can reach", c.Addr))
	}
	if len(c.Key) != identity.GossipKeySize {
		errs = append(errs, fmt.Errorf("the gossip key has %d bytes instead of %d", len(c.Key), identity.GossipKeySize))
	}
	if !c.Levels.Valid() {
		errs = append(errs, fmt.Errorf("protocol %s makes no sense", c.Levels))
	}
	if _, ok := profiles[c.Profile]; !ok {
		errs = append(errs, fmt.Errorf("profile %q is not known: %s or %s", c.Profile, LAN, Edge))
	}
	if err := checkTags(c.wireTags(c.Tags)); err != nil {
		errs = append(errs, err)
	}
	for _, s := range c.Seeds {
		if !s.IsValid() {
			errs = append(errs, errors.New("a seed address is empty"))
		}
	}
	return errors.Join(errs...)
}

// wireTags adds what this package says of the node itself.
func (c *Config) wireTags(tags map[string]string) map[string]string {
	out := maps.Clone(tags)
	if out == nil {
		out = map[string]string{}
	}
	out[tagLevel], out[tagMinLevel] = fmt.Sprint(c.Levels.Level), fmt.Sprint(c.Levels.Min)
	return out
}
