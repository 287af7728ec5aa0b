package simulate

import (
	"os"
	"runtime/debug"
	"testing"

	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/klog/v2"
)

func TestMain(m *testing.M) {
	klog.SetLogger(klog.Logger{}) // what client-go says of lost connections is what is simulated
	debug.SetGCPercent(400)
	debug.SetMemoryLimit(3 << 30) // from there on it collects more often
	// Its rate limit remembers real times, which are decades away from virtual ones.
	utilruntime.ErrorHandlers = nil
	os.Exit(m.Run())
}
