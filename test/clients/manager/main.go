// Command manager is an operator as people write them, on controller-runtime: two versions of a custom kind that a webhook converts,
// webhooks that default and validate, a reconcile loop that writes ConfigMaps and a status, and leader election by a Lease. The test
// TestClients runs two of them.
//
//	manager NAME ADDRESS DIR: ADDRESS is where the API reaches the webhooks, DIR has tls.crt, tls.key
package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	clientgoscheme "k8s.io/client-go/kubernetes/scheme"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	"sigs.k8s.io/controller-runtime/pkg/controller/controllerutil"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"
	"sigs.k8s.io/controller-runtime/pkg/webhook"
	"sigs.k8s.io/controller-runtime/pkg/webhook/admission"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "manager:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 4 {
		return errors.New("usage: manager NAME ADDRESS DIR")
	}
	name, dir := os.Args[1], os.Args[3]
	host, portText, err := net.SplitHostPort(os.Args[2])
	if err != nil {
		return err
	}
	port, err := strconv.Atoi(portText)
	if err != nil {
		return err
	}
	ctrl.SetLogger(logr.Discard())
	scheme := runtime.NewScheme()
	if err := clientgoscheme.AddToScheme(scheme); err != nil {
		return err
	}
	addTypes(scheme)
	cfg, err := ctrl.GetConfig()
	if err != nil {
		return err
	}
	lease, renew, retry := 6*time.Second, 4*time.Second, 500*time.Millisecond
	mgr, err := ctrl.NewManager(cfg, ctrl.Options{
		Scheme: scheme, Metrics: metricsserver.Options{BindAddress: "0"},
		LeaderElection: true, LeaderElectionID: "gadgets.clients.skein.io", LeaderElectionNamespace: "default",
		LeaseDuration: &lease, RenewDeadline: &renew, RetryPeriod: &retry,
		WebhookServer: webhook.NewServer(webhook.Options{Host: host, Port: port, CertDir: dir}),
	})
	if err != nil {
		return err
	}
	hooks := ctrl.NewWebhookManagedBy(mgr, &Gadget{}).WithDefaulter(hook{}).WithValidator(hook{})
	if err := hooks.Complete(); err != nil {
		return err
	}
	r := &reconciler{mgr.GetClient(), name}
	if err := ctrl.NewControllerManagedBy(mgr).For(&Gadget{}).Owns(&corev1.ConfigMap{}).Complete(r); err != nil {
		return err
	}
	go func() { // ends with the process
		<-mgr.Elected()
		fmt.Println("elected")
	}()
	return mgr.Start(ctrl.SetupSignalHandler())
}

// hook defaults and validates gadgets.
type hook struct{}

func (hook) Default(_ context.Context, g *Gadget) error {
	if g.Spec.Color == "" {
		g.Spec.Color = "grey"
	}
	return nil
}

func (hook) check(g *Gadget) (admission.Warnings, error) {
	if g.Spec.Size > 100 {
		return nil, fmt.Errorf("a gadget of size %d would not fit", g.Spec.Size)
	}
	if g.Spec.Size > 50 {
		return admission.Warnings{"that is a large gadget"}, nil
	}
	return nil, nil
}

func (h hook) ValidateCreate(_ context.Context, g *Gadget) (admission.Warnings, error) {
	return h.check(g)
}

func (h hook) ValidateUpdate(_ context.Context, _, g *Gadget) (admission.Warnings, error) {
	return h.check(g)
}

func (hook) ValidateDelete(context.Context, *Gadget) (admission.Warnings, error) { return nil, nil }

type reconciler struct {
	client.Client
	name string
}

// Reconcile makes the ConfigMap of a gadget and says so in its status.
func (r *reconciler) Reconcile(ctx context.Context, q ctrl.Request) (ctrl.Result, error) {
	var g Gadget
	if err := r.Get(ctx, q.NamespacedName, &g); err != nil {
		return ctrl.Result{}, client.IgnoreNotFound(err)
	}
	if g.DeletionTimestamp != nil {
		return ctrl.Result{}, nil
	}
	m := &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Namespace: g.Namespace, Name: g.Name}}
	if _, err := controllerutil.CreateOrUpdate(ctx, r.Client, m, func() error {
		m.Data = map[string]string{"size": strconv.FormatInt(g.Spec.Size, 10), "color": g.Spec.Color}
		return controllerutil.SetControllerReference(&g, m, r.Scheme())
	}); err != nil {
		return ctrl.Result{}, retry(err)
	}
	want := GadgetStatus{Size: g.Spec.Size, Generation: g.Generation, By: r.name}
	if g.Status.Size == want.Size && g.Status.Generation == want.Generation {
		return ctrl.Result{}, nil
	}
	g.Status = want
	return ctrl.Result{}, retry(r.Status().Update(ctx, &g))
}

// retry keeps what heals by itself from being an error: another look is due in any case.
func retry(err error) error {
	if apierrors.IsConflict(err) {
		return fmt.Errorf("again: %w", err)
	}
	return err
}
