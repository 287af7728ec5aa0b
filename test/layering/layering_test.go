package layering

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "skein.io/skein/"

// layer is a row of the table in ARCHITECTURE.md: a folder, what it may import of Skein beyond itself, and why not more.
type layer struct {
	folder string
	may    []string
	why    string
}

var layers = []layer{
	{"cmd", []string{"node", "gossip/identity", "datapath/podnet"}, "a command is a thin shell over node; a node name is checked where it is read, and only the helper executable speaks CNI"},
	{"node", []string{"gossip", "consensus", "datapath", "scheduler"}, "node is the composition layer: it sees all below it and nothing above"},
	{"scheduler", nil, "placement and controllers are functions of Kubernetes objects; gossip verdicts reach them through an interface that they own"},
	{"consensus", []string{"gossip/identity"}, "the store keeps opaque bytes; it may know who a peer is, not what a cluster does"},
	{"datapath", nil, "the datapath has its own small types so that it can be driven, tested and replaced without a cluster"},
	{"gossip", nil, "gossip carries liveness and hints, never truth: it may not reach for a store"},
	{"test", []string{"cmd", "node", "gossip", "consensus", "datapath", "scheduler", "test"}, "tests may see everything"},
}

// door is a big dependency that has one entrance.
type door struct {
	dependency string // import path prefix
	allowed    []string
	why        string
}

var doors = []door{
	{"github.com/hashicorp/serf", []string{"gossip"}, "serf is spoken only in gossip"},
	{"github.com/hashicorp/memberlist", []string{"gossip"}, "memberlist is spoken only in gossip"},
	{"github.com/lni/dragonboat", []string{"consensus"}, "dragonboat is spoken only in consensus"},
	{"github.com/cilium/ebpf", []string{"datapath"}, "eBPF objects are loaded only in datapath"},
	{"github.com/containerd/containerd", []string{"node/cri", "cmd/skein-helper"}, "containerd is reached only through node/cri; the helper executable is its runc shim"},
	{"k8s.io/cri-client", []string{"node/cri"}, "the CRI is spoken only in node/cri"},
	{"k8s.io/kubernetes", []string{"node/api"}, "upstream's contract packages have one door, so that an upgrade touches one folder"},
	{"github.com/alecthomas/kong", []string{"cmd"}, "the command line is parsed only in cmd"},
}

// pure lists packages whose imports must stay free of Kubernetes' types.
var pure = []struct{ folder, why string }{
	{"gossip", "gossip must be usable without Kubernetes"},
	{"consensus", "the store keeps opaque bytes"},
	{"datapath", "node translates Kubernetes objects into the datapath's small types"},
}

type pkg struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

func load(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-tags", "grpcnotrace", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = "../.."
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var ps []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		ps = append(ps, p)
	}
	if len(ps) < 5 {
		t.Fatalf("go list found only %d packages", len(ps))
	}
	return ps
}

func under(path, folder string) bool { return path == folder || strings.HasPrefix(path, folder+"/") }

func underAny(path string, folders []string) bool {
	return slices.ContainsFunc(folders, func(f string) bool { return under(path, f) })
}

// violations returns one line for each import that points up, sideways or through a wall.
func violations(ps []pkg) (bad []string) {
	for _, p := range ps {
		self, ok := strings.CutPrefix(p.ImportPath, module)
		if !ok {
			continue
		}
		i := slices.IndexFunc(layers, func(l layer) bool { return under(self, l.folder) })
		if i < 0 {
			bad = append(bad, self+": a top-level folder that ARCHITECTURE.md does not name")
			continue
		}
		l := layers[i]
		for _, imp := range p.Imports {
			if to, ours := strings.CutPrefix(imp, module); ours && !under(to, l.folder) && !underAny(to, l.may) {
				bad = append(bad, self+" imports "+to+": "+l.why)
			}
			for _, d := range doors {
				if under(imp, d.dependency) || strings.HasPrefix(imp, d.dependency+"/") {
					if !underAny(self, d.allowed) && l.folder != "test" {
						bad = append(bad, self+" imports "+imp+": "+d.why)
					}
				}
			}
			if strings.HasPrefix(imp, "k8s.io/") && !strings.HasPrefix(imp, "k8s.io/utils") {
				for _, q := range pure {
					if under(self, q.folder) {
						bad = append(bad, self+" imports "+imp+": "+q.why)
					}
				}
			}
		}
		for _, imp := range append(p.TestImports, p.XTestImports...) {
			if to, ours := strings.CutPrefix(imp, module); ours && l.folder != "test" && under(to, "cmd") {
				bad = append(bad, self+"'s tests import "+to+": a command is run, not imported")
			}
		}
	}
	return bad
}

func TestImportsPointDown(t *testing.T) {
	for _, v := range violations(load(t)) {
		t.Error(v)
	}
}

// The test must be able to fail.
func TestViolationsAreSeen(t *testing.T) {
	for _, c := range []struct{ from, imp, want string }{
		{"gossip/membership", module + "node/api", "never truth"},
		{"scheduler/placement", module + "gossip/health", "interface that they own"},
		{"consensus/host", "k8s.io/api/core/v1", "opaque bytes"},
		{"node/agent", "k8s.io/kubernetes/pkg/kubelet", "one door"},
		{"node/daemon", "github.com/alecthomas/kong", "only in cmd"},
		{"pkg/helpers", "fmt", "does not name"},
	} {
		got := violations([]pkg{{ImportPath: module + c.from, Imports: []string{c.imp}}})
		if len(got) != 1 || !strings.Contains(got[0], c.want) {
			t.Errorf("%s importing %s: got %q, want a line with %q", c.from, c.imp, got, c.want)
		}
	}
}
