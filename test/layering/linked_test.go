package layering

import (
	"os/exec"
	"strings"
	"testing"
)

// never is what the executable must not link, and why: each costs tens of megabytes of memory, or runs what Skein is itself.
var never = map[string]string{
	"k8s.io/kubernetes/pkg/generated/openapi":      "the documents are rendered when Skein is built; linked and rendered they take 70 MB",
	"k8s.io/kubernetes/pkg/controlplane":           "it installs every kind through go-restful, which takes 25 MB",
	"k8s.io/kubernetes/pkg/controlplane/apiserver": "it installs every kind through go-restful, which takes 25 MB",
	"k8s.io/kubernetes/cmd/kube-apiserver/app":     "it links the generated OpenAPI definitions",
	"k8s.io/kubernetes/pkg/kubelet":                "Skein's agent is its own",
	"golang.org/x/net/trace":                       "build with the tag grpcnotrace",
}

func TestWhatIsNeverLinked(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", "-tags", "grpcnotrace", module+"cmd/skein").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if len(deps) < 500 {
		t.Fatalf("only %d packages are linked", len(deps))
	}
	for _, d := range deps {
		if why, bad := never[d]; bad {
			t.Errorf("the executable links %s: %s", d, why)
		}
	}
}
