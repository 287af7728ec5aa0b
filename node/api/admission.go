package api

import (
	"context"
	"fmt"
	"strconv"
	"sync"

	"github.com/spf13/pflag"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apiserver/pkg/admission"
	webhookinit "k8s.io/apiserver/pkg/admission/plugin/webhook/initializer"
	utilfeature "k8s.io/apiserver/pkg/util/feature"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/informers"
	informerscore "k8s.io/client-go/informers/core"
	informerscorev1 "k8s.io/client-go/informers/core/v1"
	"k8s.io/client-go/kubernetes"
	listersv1 "k8s.io/client-go/listers/core/v1"
	controlplaneadmission "k8s.io/kubernetes/pkg/controlplane/apiserver/admission"
	kubeapiserveradmission "k8s.io/kubernetes/pkg/kubeapiserver/admission"
	"k8s.io/kubernetes/plugin/pkg/admission/defaulttolerationseconds"
)

// tolerationFlags guards the variables inside upstream's DefaultTolerationSeconds, which takes
// its values from the command line only.
var tolerationFlags sync.Mutex

// buildAdmission sets upstream's default plugins, and NodeRestriction.
func (b *build) buildAdmission() error {
	dyn, err := dynamic.NewForConfig(b.generic.LoopbackClientConfig)
	if err != nil {
		return err
	}
	lean := leanInformers{SharedInformerFactory: b.informers, pods: livePods{b.informers.Core().V1().Pods(), b.client}}
	generic := controlplaneadmission.Config{ExternalInformers: lean, LoopbackClientConfig: b.generic.LoopbackClientConfig, APIResourceConfig: b.resources}
	plugins, err := generic.New(nil, nil, b.services, b.tracer)
	if err != nil {
		return fmt.Errorf("admission: %w", err)
	}
	plugins = append(plugins, webhookinit.NewPluginInitializer(b.webhookAuth(), b.services)) // in place of its own
	more, err := (&kubeapiserveradmission.Config{}).New()
	if err != nil {
		return fmt.Errorf("admission: %w", err)
	}
	o := b.cfg.Access.AdmissionOptions()
	// Before upstream's, which measure: what is spared counts as done.
	o.GenericAdmission.Decorators = append(admission.Decorators{admission.DecoratorFunc(b.withoutHooks)}, o.GenericAdmission.Decorators...)

	tolerationFlags.Lock()
	defer tolerationFlags.Unlock()
	flags := pflag.NewFlagSet("", pflag.ContinueOnError)
	defaulttolerationseconds.RegisterFlags(flags)
	seconds := strconv.Itoa(int(b.cfg.EvictionGrace.Seconds()))
	for _, name := range []string{"default-not-ready-toleration-seconds", "default-unreachable-toleration-seconds"} {
		if err := flags.Set(name, seconds); err != nil {
			return fmt.Errorf("admission: %w", err)
		}
	}
	if err := o.ApplyTo(b.generic, lean, b.client, dyn, utilfeature.DefaultFeatureGate, b.generic.EffectiveVersion, append(plugins, more...)...); err != nil {
		return fmt.Errorf("admission: %w", err)
	}
	if b.cfg.NodeLabels != nil {
		b.generic.AdmissionControl = admission.NewChainHandler(b.generic.AdmissionControl, nodeLabels{b.cfg.NodeLabels})
	}
	return nil
}

// leanInformers hides the informers of all pods and of all Secrets from upstream's parts. PodSecurity lists pods when
// a namespace's labels change, others look up single ones; each would keep every pod of the
// cluster in memory for that.
type leanInformers struct {
	informers.SharedInformerFactory
	pods    informerscorev1.PodInformer     // nil: the factory's
	secrets informers.SharedInformerFactory // whose Secrets are meant; nil: the factory itself
}

func (f leanInformers) Core() informerscore.Interface {
	return leanCore{f.SharedInformerFactory.Core(), f}
}

type leanCore struct {
	informerscore.Interface
	lean leanInformers
}

func (c leanCore) V1() informerscorev1.Interface { return leanCoreV1{c.Interface.V1(), c.lean} }

type leanCoreV1 struct {
	informerscorev1.Interface
	lean leanInformers
}

func (c leanCoreV1) Pods() informerscorev1.PodInformer {
	if c.lean.pods != nil {
		return c.lean.pods
	}
	return c.Interface.Pods()
}

func (c leanCoreV1) Secrets() informerscorev1.SecretInformer {
	if c.lean.secrets != nil {
		return c.lean.secrets.Core().V1().Secrets()
	}
	return c.Interface.Secrets()
}

type livePods struct {
	informerscorev1.PodInformer
	client kubernetes.Interface
}

func (p livePods) Lister() listersv1.PodLister { return livePodLister{p.client, metav1.NamespaceAll} }

// livePodLister asks the API each time.
type livePodLister struct {
	client    kubernetes.Interface
	namespace string
}

func (l livePodLister) Pods(namespace string) listersv1.PodNamespaceLister {
	return livePodLister{l.client, namespace}
}

func (l livePodLister) Get(name string) (*corev1.Pod, error) {
	return l.client.CoreV1().Pods(l.namespace).Get(context.Background(), name, metav1.GetOptions{})
}

func (l livePodLister) List(s labels.Selector) ([]*corev1.Pod, error) {
	list, err := l.client.CoreV1().Pods(l.namespace).List(context.Background(), metav1.ListOptions{LabelSelector: s.String()})
	if err != nil {
		return nil, err
	}
	pods := make([]*corev1.Pod, len(list.Items))
	for i := range list.Items {
		pods[i] = &list.Items[i]
	}
	return pods, nil
}
