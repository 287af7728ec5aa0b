package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"

	"skein.io/skein/consensus/host"
	"skein.io/skein/consensus/mvcc"
	"skein.io/skein/consensus/shard"
	"skein.io/skein/gossip/health"
	"skein.io/skein/node/join"
)

const (
	// recoverLook is how long a recovery looks for other voters and a leader before it believes that there are none: several elections, and
	// gossip's first contacts.
	recoverLook = 8 * time.Second
	// recoveredDir is where the new store is prepared; formerStore and the old generation's number is where the one before goes.
	recoveredDir = "raft.new"
	formerStore  = "raft.before-"
)

// ErrMajority is returned by Recover when the cluster does not need it.
var ErrMajority = errors.New("a majority of the voters is alive: there is nothing to recover")

// RecoverOptions of Recover.
type RecoverOptions struct {
	// Confirm is asked, after the report was written to Out, whether to go on.
	Confirm func(question string) (bool, error)
	// Out gets the report.
	Out io.Writer
}

// Recover makes this node's data the cluster's, when a majority of the voters is lost for good: the store goes on with this node as its
// only voter, in the cluster's next generation. The daemon must not run. Until everything is prepared nothing changes; the former store
// stays on disk. Other nodes, also voters that were believed dead, become members of the new generation when they meet it.
func Recover(ctx context.Context, cfg Config, o RecoverOptions) error {
	cfg.setDefaults()
	if err := cfg.Validate(); err != nil {
		return fmt.Errorf("recover:\n%w", err)
	}
	unlock, err := lockState(cfg.StateDir)
	if errors.Is(err, errBusy) {
		return fmt.Errorf("recover: stop this node's daemon first ('systemctl stop skein'; its pods go on running): %w", err)
	}
	if err != nil {
		return err
	}
	defer unlock()
	if err := checkRestored(cfg.StateDir); err != nil {
		return err
	}
	n := &node{cfg: cfg, log: cfg.Logger.With("node", cfg.Name), started: time.Now()}
	if n.id, err = resume(cfg); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	if n.hostID, err = hostIDOf(n.id.Key.Public()); err != nil {
		return err
	}
	if n.ring, err = openRing(cfg.StateDir); err != nil {
		return err
	}
	dir := filepath.Join(cfg.StateDir, recoveredDir)
	if err := os.RemoveAll(dir); err != nil { // of an attempt that was interrupted
		return fmt.Errorf("recover: %w", err)
	}
	number, why, err := n.salvage(ctx, dir, o)
	if err == nil {
		err = n.refound(ctx, dir, number+1, why)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	former, err := swapStores(cfg.StateDir, number)
	if err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	fmt.Fprintf(o.Out, "\nthe store goes on as generation %d with node %s as its only voter: start it with 'skein up'\nother nodes join it by themselves; the former store is kept in %s until you remove it\n", number+1, cfg.Name, former)
	return nil
}

// salvage reports, asks, and copies what this node holds into dir. It returns the present generation.
func (n *node) salvage(ctx context.Context, dir string, o RecoverOptions) (number uint64, why string, err error) {
	if n.gossip, err = n.startGossip(); err != nil {
		return 0, "", fmt.Errorf("recover: %w", err)
	}
	defer func() { err = errors.Join(err, n.gossip.Shutdown()) }()
	if n.host, err = n.startHost(); err != nil {
		return 0, "", fmt.Errorf("recover: %w", err)
	}
	defer func() { err = errors.Join(err, n.host.Close(ctx)) }() // once more does nothing
	for _, s := range n.host.Status() {
		if s.Role == host.RoleNone {
			return 0, "", fmt.Errorf("recover: node %s holds no replica of shard %s: run it on a node that does", n.cfg.Name, s.Shard)
		}
	}
	fmt.Fprintf(o.Out, "looking for other voters and a leader, %s ...\n\n", recoverLook)
	wrecks, err := n.host.Inspect(ctx, recoverLook)
	if err != nil {
		return 0, "", err
	}
	names := n.claimedNames(ctx)
	number, _ = n.host.Generation()
	for _, m := range n.gossip.Members() {
		if theirs := generationNumber(m.Tags[tagGeneration]); m.Verdict == health.Alive && theirs > number {
			return 0, "", fmt.Errorf("recover: node %s is in generation %d of the cluster, which was recovered there; this one is in %d: start it ('skein up') and it joins", m.Name, theirs, number)
		}
	}
	if err := n.report(o.Out, wrecks, names, number); err != nil {
		return 0, "", err
	}
	ok, err := o.Confirm(fmt.Sprintf("make the data of node %s the whole cluster's?", n.cfg.Name))
	if err != nil || !ok {
		return 0, "", errors.Join(err, errors.New("recover: not confirmed, nothing was changed"))
	}
	// What a shard that still has a leader has acknowledged is fetched up to now.
	for _, w := range wrecks {
		if c, ok := n.host.Client(w.Shard); ok && !w.Lost() {
			if _, err := c.KV.Get(ctx, keysKey); err != nil {
				return 0, "", fmt.Errorf("recover: catch up with shard %s: %w", w.Shard, err)
			}
		}
	}
	why = fmt.Sprintf("recovered from the data of node %s", n.cfg.Name)
	return number, why, diskFull(n.host.Salvage(ctx, dir, why, revisionBump))
}

// refound makes a store of what was salvaged.
func (n *node) refound(ctx context.Context, dir string, number uint64, why string) error {
	m := mvcc.New(mvcc.Config{Dir: host.RebuildDir(dir, shard.System)})
	if _, err := m.Open(nil); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	ring, _ := n.ring.Ring()
	keys, err := storedKeys(ctx, m, ring)
	if err = errors.Join(err, m.Close()); err != nil {
		return fmt.Errorf("recover: %w", err)
	}
	prepared := func(string, string) error { return nil }
	if err := rebuildStore(ctx, n.cfg, n.id, keys.authority, dir, number, why, prepared); err != nil {
		return fmt.Errorf("recover: %w", diskFull(err))
	}
	return nil
}

// swapStores puts the new store in the place of the old in one step, and the old one aside.
func swapStores(stateDir string, number uint64) (former string, err error) {
	current, fresh := filepath.Join(stateDir, "raft"), filepath.Join(stateDir, recoveredDir)
	former = fmt.Sprintf("%s%d", filepath.Join(stateDir, formerStore), number)
	if err := os.RemoveAll(former); err != nil {
		return "", err
	}
	if b, err := os.ReadFile(filepath.Join(current, "term")); err == nil { // orders of former leaders stay refused
		if err := writeFile(filepath.Join(fresh, "term"), b); err != nil {
			return "", err
		}
	}
	if err := unix.Renameat2(unix.AT_FDCWD, fresh, unix.AT_FDCWD, current, unix.RENAME_EXCHANGE); err != nil {
		return "", fmt.Errorf("put %s in the place of %s: %w", fresh, current, err)
	}
	return former, errors.Join(os.Rename(fresh, former), syncDir(stateDir))
}

// claimedNames are the nodes' names by their names in the store's memberships, as this node's data has them.
func (n *node) claimedNames(ctx context.Context) map[string]string {
	out := map[string]string{}
	c, ok := n.host.Client(systemShard)
	if !ok {
		return out
	}
	got, err := c.KV.Get(ctx, join.ClaimPrefix, clientv3.WithPrefix(), clientv3.WithSerializable())
	if err != nil {
		return out // names are for people
	}
	for _, kv := range got.Kvs {
		var r struct {
			Name    string `json:"name"`
			KeyHash []byte `json:"keyHash"`
		}
		if json.Unmarshal(kv.Value, &r) == nil {
			if id, err := hostIDOfHash(r.KeyHash); err == nil {
				out[id] = r.Name
			}
		}
	}
	return out
}

// report says what there is and what may be lost; it refuses when nothing is.
func (n *node) report(out io.Writer, wrecks []host.Wreck, names map[string]string, number uint64) error {
	name := func(m host.Member) string {
		if x, ok := names[m.NodeHostID]; ok {
			return x
		}
		return m.Node
	}
	list := func(ms []host.Member) string {
		var out []string
		for _, m := range ms {
			out = append(out, name(m))
		}
		slices.Sort(out)
		return strings.Join(out, ",")
	}
	fmt.Fprintf(out, "cluster %s, generation %d, as node %s has it:\n\n", n.id.ClusterID, number, n.cfg.Name)
	w := tabwriter.NewWriter(out, 0, 4, 2, ' ', 0)
	fmt.Fprintln(w, "SHARD\tVOTERS\tANSWER\tREVISION\tAPPLIED\tLOG TO\tLAST CONTACT WITH A LEADER")
	lost, dead := 0, map[string]bool{}
	var alive, ahead []string
	var open uint64
	for _, x := range wrecks {
		contact := "not recorded"
		switch {
		case x.Leader != (host.Member{}):
			contact = "now, with " + name(x.Leader)
		case !x.Contact.IsZero():
			contact = fmt.Sprintf("%s (%s ago)", x.Contact.Format(time.RFC3339), time.Since(x.Contact).Round(time.Second))
		}
		fmt.Fprintf(w, "%s\t%s\t%d of %d (%s)\t%d\t%d\t%d\t%s\n", x.Shard, list(x.Voters), len(x.Answering), len(x.Voters), list(x.Answering), x.Revision, x.Applied, x.Last, contact)
		if x.Lost() {
			lost++
		} else {
			alive = append(alive, fmt.Sprintf("shard %s: %d of %d voters answer (%s), %d are a majority", x.Shard, len(x.Answering), len(x.Voters), list(x.Answering), x.Quorum()))
		}
		for _, v := range x.Voters {
			if !slices.Contains(x.Answering, v) {
				dead[name(v)] = true
			}
		}
		if len(x.Ahead) > 0 {
			ahead = append(ahead, fmt.Sprintf("of shard %s %s", x.Shard, list(x.Ahead)))
		}
		open += x.Last - min(x.Last, x.Committed)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if lost == 0 {
		return fmt.Errorf("recover: %w: %s", ErrMajority, strings.Join(alive, "; "))
	}
	var deadNames []string
	for x := range dead {
		deadNames = append(deadNames, x)
	}
	slices.Sort(deadNames)
	fmt.Fprintf(out, "\nbelieved dead: %s\n\n", strings.Join(deadNames, ", "))
	fmt.Fprintf(out, "Kept: all that this node has, also the %d entries in its log that it does not know to be committed.\n", open)
	fmt.Fprintf(out, "May be lost: what was written after this node's last contact, or shortly before it, and reached only the nodes believed dead.\n")
	fmt.Fprintf(out, "If one of them comes back, its data is not read: it becomes a new replica. If they may come back together, wait for them instead.\n")
	if len(ahead) > 0 {
		fmt.Fprintf(out, "\nWARNING: other nodes answer and have applied more than this one (%s): recover on the one that has most.\n", strings.Join(ahead, "; "))
	}
	for _, x := range alive {
		fmt.Fprintf(out, "\nstill alive: %s; it is fetched up to now, and its other replicas are replaced.\n", x)
	}
	return nil
}
