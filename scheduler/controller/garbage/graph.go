package garbage

import (
	"crypto/sha256"
	"hash/fnv"
	"slices"
	"sync"
	"unique"

	"github.com/google/uuid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
)

// id stands for an object's uid in 16 bytes.
type id [16]byte

func idOf(uid types.UID) id {
	if u, err := uuid.Parse(string(uid)); err == nil {
		return id(u)
	}
	sum := sha256.Sum256([]byte(uid))
	return id(sum[:16])
}

// kind is a kind of object that is watched. There is one for each, so that
// pointers can be compared.
type kind struct {
	gvr        schema.GroupVersionResource
	gvk        schema.GroupVersionKind
	namespaced bool
}

// state is what matters of an object's deletion.
type state uint8

const (
	deleting   state = 1 << iota // it has a deletion timestamp
	foreground                   // its deletion waits for that of its dependents
	orphan                       // its deletion waits until its dependents are let go
)

func stateOf(o metav1.Object) (s state) {
	if o.GetDeletionTimestamp() == nil {
		return 0
	}
	s = deleting
	for _, f := range o.GetFinalizers() {
		switch f {
		case metav1.FinalizerDeleteDependents:
			s |= foreground
		case metav1.FinalizerOrphanDependents:
			s |= orphan
		}
	}
	return s
}

func (s state) waits() bool { return s&(foreground|orphan) != 0 }

// place is where an object is: enough to see that a reference to it is wrong.
type place struct {
	kind *kind
	ns   unique.Handle[string]
	ref  uint32 // hash of group, kind and name
}

// edge is a reference to an owner.
type edge struct {
	owner  id
	ref    uint32
	blocks bool
}

func refHash(group, kind, name string) uint32 {
	h := fnv.New32a()
	for _, s := range []string{group, kind, name} {
		h.Write([]byte(s))
		h.Write([]byte{0})
	}
	return h.Sum32()
}

// edgesOf returns the references of an object, one for each owner.
func edgesOf(refs []metav1.OwnerReference) []edge {
	var out []edge
	for _, r := range refs {
		gv, _ := schema.ParseGroupVersion(r.APIVersion) // validated by the API
		e := edge{owner: idOf(r.UID), ref: refHash(gv.Group, r.Kind, r.Name), blocks: r.BlockOwnerDeletion != nil && *r.BlockOwnerDeletion}
		if i := slices.IndexFunc(out, func(x edge) bool { return x.owner == e.owner }); i >= 0 {
			out[i].blocks = out[i].blocks || e.blocks
			continue
		}
		out = append(out, e)
	}
	return out
}

// node is an object that has owners, or whose deletion waits for dependents.
type node struct {
	id     id
	kind   *kind
	ns     unique.Handle[string]
	name   string
	owners []edge
	state  state
}

// graph knows which objects exist and who owns whom, and nothing else: some 40
// bytes for an object without owners, some 250 for one with. It is safe for
// concurrent use. Its methods that change it return the objects to look at.
type graph struct {
	mu sync.Mutex
	// live holds every object that the watches show. Guarded by mu.
	live map[id]place
	// nodes holds those that have owners or wait. Guarded by mu.
	nodes map[id]*node
	// dependents holds the nodes that name an owner, by owner, whether that
	// exists or not. Guarded by mu.
	dependents map[id]map[*node]struct{}
}

func newGraph() *graph {
	return &graph{live: map[id]place{}, nodes: map[id]*node{}, dependents: map[id]map[*node]struct{}{}}
}

// observe takes in an object as a watch shows it.
func (g *graph) observe(k *kind, o metav1.Object) (look []id) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.observeLocked(k, o)
}

func (g *graph) observeLocked(k *kind, o metav1.Object) (look []id) {
	if o.GetUID() == "" {
		return nil
	}
	x := idOf(o.GetUID())
	if _, known := g.live[x]; !known {
		p := place{k, unique.Make(o.GetNamespace()), refHash(k.gvk.Group, k.gvk.Kind, o.GetName())}
		g.live[x] = p
		for dep := range g.dependents[x] { // those that came before it
			if i := slices.IndexFunc(dep.owners, func(e edge) bool { return e.owner == x }); i >= 0 && !p.fits(dep, dep.owners[i]) {
				look = append(look, dep.id)
			}
		}
	}
	edges, st := edgesOf(o.GetOwnerReferences()), stateOf(o)
	n := g.nodes[x]
	if n == nil {
		if len(edges) == 0 && !st.waits() {
			return look
		}
		n = &node{id: x, kind: k, ns: unique.Make(o.GetNamespace()), name: o.GetName()}
		g.nodes[x] = n
	}
	look = append(look, g.setOwners(n, edges)...)
	before := n.state
	n.state = st
	if st&orphan > before&orphan {
		look = append(look, x)
	}
	if st&foreground > before&foreground {
		look = append(look, x)
		for dep := range g.dependents[x] {
			look = append(look, dep.id)
		}
	}
	if len(edges) == 0 && !st.waits() {
		delete(g.nodes, x)
	}
	return look
}

// fits says that dependent n's reference e may mean the object at p.
func (p place) fits(n *node, e edge) bool {
	return p.ref == e.ref && (!p.kind.namespaced || p.ns == n.ns)
}

func (g *graph) setOwners(n *node, edges []edge) (look []id) {
	for _, was := range n.owners {
		i := slices.IndexFunc(edges, func(e edge) bool { return e.owner == was.owner })
		if i < 0 {
			g.unlink(n, was.owner)
		}
		// An owner that waits for this one may be free to go.
		if o := g.nodes[was.owner]; o != nil && o.state&foreground != 0 && was.blocks && (i < 0 || !edges[i].blocks) {
			look = append(look, was.owner)
		}
	}
	for _, e := range edges {
		if slices.Contains(n.owners, e) {
			continue
		}
		deps := g.dependents[e.owner]
		if deps == nil {
			deps = map[*node]struct{}{}
			g.dependents[e.owner] = deps
		}
		deps[n] = struct{}{}
		p, exists := g.live[e.owner]
		if !exists || !p.fits(n, e) {
			look = append(look, n.id)
		} else if o := g.nodes[e.owner]; o != nil && o.state&foreground != 0 {
			look = append(look, n.id, e.owner)
		}
	}
	n.owners = edges
	return look
}

func (g *graph) unlink(n *node, owner id) {
	deps := g.dependents[owner]
	delete(deps, n)
	if len(deps) == 0 {
		delete(g.dependents, owner)
	}
}

// gone takes in that the object with that uid does not exist any more.
func (g *graph) gone(uid types.UID) (look []id) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.goneLocked(idOf(uid))
}

func (g *graph) goneLocked(x id) (look []id) {
	delete(g.live, x)
	if n := g.nodes[x]; n != nil {
		delete(g.nodes, x)
		for _, e := range n.owners {
			g.unlink(n, e.owner)
			if o := g.nodes[e.owner]; o != nil && o.state&foreground != 0 {
				look = append(look, e.owner)
			}
		}
	}
	for dep := range g.dependents[x] {
		look = append(look, dep.id)
	}
	return look
}

// replace takes in that objs are all that there is of kind k.
func (g *graph) replace(k *kind, objs []metav1.Object) (look []id) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := make(map[id]struct{}, len(objs))
	for _, o := range objs {
		now[idOf(o.GetUID())] = struct{}{}
		look = append(look, g.observeLocked(k, o)...)
	}
	for x, p := range g.live {
		if _, still := now[x]; p.kind == k && !still {
			look = append(look, g.goneLocked(x)...)
		}
	}
	return look
}

// drop forgets a kind that is watched no longer. What its objects own stays:
// that they are not seen does not mean that they are gone.
func (g *graph) drop(k *kind) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for x, p := range g.live {
		if p.kind != k {
			continue
		}
		delete(g.live, x)
		if n := g.nodes[x]; n != nil {
			delete(g.nodes, x)
			for _, e := range n.owners {
				g.unlink(n, e.owner)
			}
		}
	}
}

// sight is what the graph shows of a node at one time.
type sight struct {
	object
	owned      bool
	dependents []dependent // filled in if the object waits for them
	hasDeps    bool
	cycle      bool // a dependent waits for its own dependents
}

// object is the address of an object.
type object struct {
	id    id
	kind  *kind
	ns    string
	name  string
	state state
}

type dependent struct {
	object
	blocks bool
}

func (n *node) object() object { return object{n.id, n.kind, n.ns.Value(), n.name, n.state} }

// look returns what is known of x; false if it has neither owners nor waits.
func (g *graph) look(x id) (sight, bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	n := g.nodes[x]
	if n == nil {
		return sight{}, false
	}
	s := sight{object: n.object(), owned: len(n.owners) > 0, hasDeps: len(g.dependents[x]) > 0}
	for dep := range g.dependents[x] {
		s.cycle = s.cycle || dep.state&foreground != 0
		if n.state.waits() {
			i := slices.IndexFunc(dep.owners, func(e edge) bool { return e.owner == x })
			s.dependents = append(s.dependents, dependent{dep.object(), i >= 0 && dep.owners[i].blocks})
		}
	}
	return s, true
}

// where returns the namespace of a live object, and whether its kind has any.
func (g *graph) where(x id) (ns string, namespaced, live bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	p, ok := g.live[x]
	if !ok {
		return "", false, false
	}
	return p.ns.Value(), p.kind.namespaced, true
}
